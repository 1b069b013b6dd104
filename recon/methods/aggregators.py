"""Methods that combine the task gradients through their Gramian: PCGrad, CAGrad, MGDA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls
from torch import Tensor
from torchjd.aggregation import PCGradWeighting

from recon.errors import UsageError
from recon.methods.base import GramianAggregator
from recon.methods.registry import register

Array = NDArray[np.float64]


@register(
    "pcgrad",
    title="Projecting conflicting gradients",
    paper="Yu, Kumar, Gupta, Levine, Hausman, Finn, NeurIPS 2020, arXiv 2001.06782, Algorithm 1",
    scale="The sum of the projected task gradients: the sum of the task gradients where none conflict.",
)
class PCGrad(GramianAggregator):
    """Projects each gradient onto the normal plane of those it conflicts with, in random order, and sums.

    Args:
        seed: of the method's own random stream, which gives T orders per step (`torch.randperm` of a
            `torch.Generator` with that seed). The global random state is neither read nor changed, and the
            stream is part of the state_dict.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._project = PCGradWeighting()
        self._stream = torch.Generator().manual_seed(seed).get_state()

    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        G = self._finite(gramian, tasks)
        # A gradient so small that its squared norm is zero conflicts with none, and must not be divided by.
        present = G.diagonal() > 0
        G = torch.where(present & present[:, None], G, 0.0)
        # TorchJD draws from the global generator: lend it ours.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._stream)
            weights = self._project(G)
            self._stream = torch.get_rng_state()
        return weights.to(gramian)

    def get_extra_state(self) -> Tensor:
        """The position in the random stream. Not a buffer: generator states live on the CPU only."""
        return self._stream

    def set_extra_state(self, state: Tensor) -> None:
        """Continues where the saved stream was."""
        self._stream = state.cpu()


@register(
    "cagrad",
    title="Conflict-averse gradient descent",
    paper="Liu, Liu, Jin, Stone, Liu, NeurIPS 2021, arXiv 2110.14048, Algorithm 1",
    scale="T times a vector within c times the length of the mean gradient around it; (1 + c) T g where all "
    "gradients are g.",
)
class CAGrad(GramianAggregator):
    """The vector that helps the worst-off task most, in a ball around the mean gradient, times T.

    The ball's radius is c times the length of the mean gradient.

    Args:
        c: 0 gives joint training; from 1 on, convergence to an optimum of the mean loss is not guaranteed
            any more. The published NYU-v2 and CityScapes runs use 0.4.
        rescale: divide by `1 + c²`, as the published code does, though not the paper.

    Raises:
        UsageError: c is negative or not finite.
    """

    def __init__(self, c: float = 0.4, rescale: bool = False) -> None:
        super().__init__()
        if not 0 <= c < math.inf:
            raise UsageError(f"CAGrad's c must be a finite number of at least 0, but got {c}.")
        self.c = c
        self.rescale = rescale

    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        G = self._finite(gramian, tasks).numpy()
        weights = len(G) * _conflict_averse_weights(_factor(G), self.c)
        if self.rescale:
            weights /= 1 + self.c**2
        return torch.from_numpy(weights).to(gramian)


@register(
    "mgda",
    title="Multiple-gradient descent",
    paper="Désidéri, C. R. Math. 350, 2012; Sener, Koltun, NeurIPS 2018, arXiv 1810.04650, eq. (3)",
    scale="T times the shortest convex combination of the task gradients: never longer than their sum.",
)
class MGDA(GramianAggregator):
    """The shortest vector in the convex hull of the task gradients, times T.

    It is zero exactly where no direction helps all tasks, so also where one task's gradient is zero. Solved
    exactly: the usual Frank-Wolfe iteration stops far from the optimum where gradients differ in length.
    """

    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        G = self._finite(gramian, tasks).numpy()
        return torch.from_numpy(len(G) * _min_norm_weights(_factor(G))).to(gramian)


def _factor(G: Array) -> Array:
    """R with RᵀR = G: vectors, one per column, with the gradients' inner products."""
    lengths = np.sqrt(G.diagonal())
    unit = np.where(lengths > 0, lengths, 1.0)
    # The factor of G itself would carry the rounding errors of the longest gradient in every column.
    eigenvalues, Q = np.linalg.eigh(G / np.outer(unit, unit))
    R: Array = np.sqrt(eigenvalues.clip(min=0))[:, None] * Q.T * lengths
    return R


def _min_norm_weights(R: Array) -> Array:
    """The w on the simplex that minimises ‖R w‖, exact up to rounding.

    Non-negative least squares with the sum as one more row, `‖R v‖² + (Σ v - 1)²` over v ≥ 0, has the
    solution v = s w: for v = s u with u on the simplex and n = ‖R u‖², the best s leaves n / (1 + n), which
    grows with n. With v counted in units of 1 / length, the columns are unit vectors, and gradients of very
    different lengths stay well conditioned.
    """
    lengths = np.linalg.norm(R, axis=0)
    shortest = lengths.min()
    if shortest == 0:
        return (lengths == 0) / np.count_nonzero(lengths == 0)
    units = shortest / lengths
    count = len(lengths)
    v, _ = nnls(np.vstack([R / lengths, units]), np.eye(count + 1)[count], maxiter=100 * count)
    w: Array = v * units
    return w / w.sum()


def _conflict_averse_weights(R: Array, c: float) -> Array:
    """CAGrad's weights in mean scale, exact up to rounding.

    With g_w = R w, g_0 the mean and r = c ‖g_0‖ the ball's radius, the dual is to minimise
    `g_w·g_0 + r ‖g_w‖` over w on the simplex, and the update is `g_0 + r g_w / ‖g_w‖`. Since `r ‖g_w‖` is the
    least value of `(‖g_w‖² / μ + μ r²) / 2` over μ > 0, the best w for a given μ minimises `‖g_w + μ g_0‖`:
    it is the min-norm point of the gradients shifted by μ g_0. The best μ has ‖g_w‖ = μ r, and there is
    only one, because the problem is convex in (w, μ).

    TorchJD hands the dual to a conic solver, which stops at a tolerance in the objective. The error of the update is
    its square root: where the gradients nearly cancel, the whole gain of the worst-off task can get lost.
    """
    lengths = np.linalg.norm(R, axis=0)
    mean = R.mean(axis=1)
    radius = c * np.linalg.norm(mean)
    uniform = np.full(len(lengths), 1 / len(lengths))
    if radius <= 1e-12 * lengths.max():
        return uniform

    def shifted_weights(log_mu: float) -> Array:
        return _min_norm_weights(R + math.exp(log_mu) * mean[:, None])

    def excess(log_mu: float) -> float:
        return float(np.linalg.norm(R @ shifted_weights(log_mu))) / (math.exp(log_mu) * radius) - 1

    # Where g_w is zero at the optimum, the ball does not bind: a small μ gives an update that harms no task.
    log_mu, highest = math.log(1e-6), math.log(2 * lengths.max() / radius)
    if highest > log_mu and excess(log_mu) > 0:
        log_mu = brentq(excess, log_mu, highest)
    return uniform + shifted_weights(log_mu) / math.exp(log_mu)
