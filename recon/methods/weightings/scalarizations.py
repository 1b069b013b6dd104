"""Weightings that minimise another function of the losses: geometric mean, IMTL-L, smooth Tchebycheff."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import scalarization

from recon.errors import UsageError
from recon.methods.bases.learned_scales import LearnedScales
from recon.methods.bases.loss_weights import LossWeights
from recon.methods.bases.task_values import TaskValues, read_values, values_by_task
from recon.methods.registry import register


class _Scalarization(LossWeights):
    """Descends a function of the losses: each is weighed by the function's derivative."""

    memoryless = True

    @abstractmethod
    def _scalarize(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        """The function, in sum scale: its derivatives are 1 where all losses are equal."""

    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        with torch.enable_grad():
            losses = losses.clone().requires_grad_()
            return torch.autograd.grad(self._scalarize(losses, positions), losses)[0]


@register(
    "gls",
    title="Geometric loss strategy",
    paper="Chennupati, Sistu, Yogamani, Rawashdeh, CVPR Workshops 2019, arXiv 1904.08492",
    scale="T times the geometric mean GM of the losses: the weights GM / L are 1 where all losses are equal, and their "
    "product always is.",
)
class GLS(_Scalarization):
    """Descends the geometric mean of the losses, times T: the scales of the losses do not matter.

    Raises:
        UsageError: from `combine`: a loss is not positive.
    """

    scale_free = True

    def __init__(self) -> None:
        super().__init__()
        self._mean = scalarization.GeometricMean()

    def _scalarize(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        self._refuse(losses.detach() <= 0, positions, "takes the geometric mean of losses that are above 0")
        return len(losses) * self._mean(losses)


@register(
    "imtl-l",
    title="Impartial multi-task learning, loss balance",
    paper="Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, ICLR 2021: IMTL-L",
    scale="Starts as the sum of the task gradients, then multiplies each by its learned exp(s), near 1 / L in the end.",
)
class IMTLL(LearnedScales):
    """Learns to scale every loss to 1: the sum of `exp(s) L - s`.

    The s start at 0 and are parameters, made by `setup`, for the caller's optimizer to train along with the model,
    without weight decay. That of an absent task gets no gradient.

    Raises:
        UsageError: from `combine`: a loss is negative, so that its s would grow without end.
    """

    works_alone = True

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        values, positions = self._stack(losses), self._positions(losses)
        self._refuse(values.detach() < 0, positions, "scales losses of at least 0 to 1")
        return super().combine(losses)

    def _scalarizer(self) -> nn.Module:
        return scalarization.IMTLL(())

    def _weight(self, s: Tensor) -> Tensor:
        return torch.exp(s)


@register(
    "stch",
    title="Smooth Tchebycheff scalarization",
    paper="Lin, Zhang, Yang, Liu, Wang, Zhang, ICML 2024, arXiv 2402.19078, with equal preferences",
    scale="T² times the paper's gradient: the weights of a step's tasks add up to their number T.",
)
class STCH(_Scalarization):
    """Descends a smooth maximum of the losses: the weights are `T softmax((L - reference) / (T mu))`.

    Args:
        mu: the smaller, the more the worst-off task alone counts.
        reference: the best loss that each task can hope for, in the order of the tasks or by name as in
            `"seg:0.3/depth:0.1"`; 0 where not given.

    Raises:
        UsageError: mu is not a positive number, or the reference has not one for each task.
        UnknownNameError: the reference is for no task of the run.
    """

    reference: Tensor

    def __init__(self, mu: float = 1.0, reference: TaskValues | None = None) -> None:
        super().__init__()
        if not 0 < mu < math.inf:
            raise UsageError(f"STCH's mu must be positive and finite, but got {mu}.")
        self.mu = mu
        self._given = {} if reference is None else read_values(reference, "references", least=-math.inf)

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"mu": self.mu, "reference": self._given}

    def _create_state(self) -> None:
        super()._create_state()
        given = values_by_task(self._given, self.tasks, "references")
        self.register_buffer("reference", torch.tensor([given.get(task, 0.0) for task in self.tasks]))

    def _scalarize(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        smooth = scalarization.STCH(self.mu, reference=self.reference[list(positions)])
        return len(losses) ** 2 * smooth(losses)
