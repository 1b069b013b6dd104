"""Aligned-MTL: gradients made orthogonal and equally long, as near to the original ones as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torchjd.aggregation import AlignedMTLWeighting

from recon.errors import UsageError
from recon.methods.aggregators.solvers import RANK_TOLERANCE
from recon.methods.bases.solved import Array
from recon.methods.bases.torchjd_aggregator import TorchJDAggregator
from recon.methods.registry import register

_Size = Literal["min", "median", "rmse"]


@register(
    "aligned-mtl",
    title="Independent component alignment",
    paper="Senushkin, Patakin, Kuznetsov, Konushin, CVPR 2023, arXiv 2305.19000, Algorithm 1",
    scale="T times the mean of the aligned gradients, which are as long as the least singular value of the original "
    "ones (or the median, or the root mean square): short where they are nearly dependent, the sum where they agree.",
)
class AlignedMTL(TorchJDAggregator):
    """The sum of the gradients after all their singular values but the zeros are made equal.

    Zero means below 1e-3 of the largest, about the rounding of float32 gradients' Gramian, which the authors' code
    makes in float32. TorchJD's limit is that of the Gramian's dtype, here float64.

    Args:
        size: the common singular value: the "min" that is not zero, as in the paper, "median", or "rmse", the root
            mean square. With "min", two gradients that all but agree leave hardly any update: they differ in a
            direction whose singular value is nearly zero, and which nothing may stick out of.

    Raises:
        UsageError: there is no such size.
    """

    def __init__(self, size: _Size = "min") -> None:
        if size not in get_args(_Size):
            raise UsageError(f"Aligned-MTL's size must be one of {', '.join(get_args(_Size))}, but got {size!r}.")
        super().__init__(AlignedMTLWeighting(scale_mode=size))
        self.size = size

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        eigenvalues, Q = np.linalg.eigh(G)
        eigenvalues[eigenvalues < RANK_TOLERANCE * eigenvalues[-1]] = 0
        return len(G) * super()._solve(Q * eigenvalues @ Q.T, positions)
