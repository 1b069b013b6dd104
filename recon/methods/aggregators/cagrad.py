"""CAGrad: the update that helps the worst-off task most, near the mean gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq

from recon.errors import UsageError
from recon.methods.aggregators.solvers import factor, min_norm_weights
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register


@register(
    "cagrad",
    title="Conflict-averse gradient descent",
    paper="Liu, Liu, Jin, Stone, Liu, NeurIPS 2021, arXiv 2110.14048, Algorithm 1",
    scale="T times a vector within c times the length of the mean gradient around it; (1 + c) T g where all "
    "gradients are g.",
)
class CAGrad(SolvedAggregator):
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

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        weights = len(G) * _conflict_averse_weights(factor(G), self.c)
        return weights / (1 + self.c**2) if self.rescale else weights


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
        return min_norm_weights(R + math.exp(log_mu) * mean[:, None])

    def excess(log_mu: float) -> float:
        return float(np.linalg.norm(R @ shifted_weights(log_mu))) / (math.exp(log_mu) * radius) - 1

    # Where g_w is zero at the optimum, the ball does not bind: a small μ gives an update that harms no task.
    log_mu, highest = math.log(1e-6), math.log(2 * lengths.max() / radius)
    if highest > log_mu and excess(log_mu) > 0:
        log_mu = brentq(excess, log_mu, highest)
    return uniform + shifted_weights(log_mu) / math.exp(log_mu)
