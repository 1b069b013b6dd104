"""Uncertainty weighting: the weights of the losses are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchjd import scalarization

from recon.methods.bases.learned_scales import LearnedScales
from recon.methods.registry import register


@register(
    "uw",
    title="Uncertainty weighting",
    paper="Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115, eq. (7) with s = log σ²",
    scale="Starts as the sum of the task gradients, then multiplies each by its learned exp(-s).",
)
class UW(LearnedScales):
    """Weighs every loss by a learned uncertainty: the sum of `exp(-s) L + s`.

    The log-variances s start at 0 and are parameters, made by `setup`, for the caller's optimizer to train
    along with the model, without weight decay. The log-variance of an absent task gets no gradient.
    """

    works_alone = True

    factor = 2.0  # TorchJD keeps the paper's factor 1/2, which would start at half the sum of the losses.

    def _scalarizer(self) -> nn.Module:
        return scalarization.UW(())

    def _weight(self, s: Tensor) -> Tensor:
        return torch.exp(-s)
