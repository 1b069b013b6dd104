"""Methods that share the gain fairly among the tasks: Nash-MTL and FairGrad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recon.errors import UsageError
from recon.methods.aggregators.solvers import unit_gramian
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register

_RIDGE = 1e-12  # what is added to the squared norm of every unit gradient
_ITERATIONS = 300


@register(
    "nash-mtl",
    title="Nash bargaining",
    paper="Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, ICML 2022, arXiv 2202.01017, Algorithm 1",
    scale="√(T ‖J Jᵀ‖) long (Frobenius norm), as in the authors' code without its clipping: the sum where all "
    "gradients agree.",
)
class NashMTL(SolvedAggregator):
    """The Nash bargaining solution: the direction that maximises the product of the tasks' gains.

    Its weights w > 0 solve `G w = 1 / w`; each task contributes alike to the update, however long its gradient is.
    Solved in every step, to rounding, by a damped Newton iteration in place of the paper's sequence of convex
    programs. `FairGrad`, of which this is α = 1, describes gradients that cancel or are zero. The authors' code
    also clips the update to length 1: that is left to the training.
    """

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        return _fair_weights(G, 1.0)


@register(
    "fairgrad",
    title="Fair gradients",
    paper="Ban, Ji, ICML 2024, arXiv 2402.15638, eq. (4)",
    scale="√(T ‖J Jᵀ‖) long (Frobenius norm), like that of nash-mtl: the sum where all gradients agree.",
)
class FairGrad(SolvedAggregator):
    """The direction d that maximises the α-fair utility of the tasks' gains, `Σ (g_i·d)^(1-α) / (1-α)`, in a ball.

    Its weights w > 0 solve `G w = w^(-1/α)`, the stationarity of a strictly convex problem, found by a damped
    Newton iteration. The length that this gives depends on the unit in which the gradients are counted, which
    the paper leaves open; only the direction is taken from it, and the length from Nash-MTL.

    Where some of the gradients cancel, so that no direction helps them all, there is no solution; the update then
    goes to zero with what is left of the gain, down to 1e-6 of the gradients' length. A task whose gradient is zero
    is left out.

    Args:
        alpha: 0 would be joint training, 1 is Nash-MTL (proportional fairness), and the larger it is, the more the task
            that gains least counts.

    Raises:
        UsageError: alpha is not between 0.1 and 10.
    """

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        if not 0.1 <= alpha <= 10:
            raise UsageError(f"FairGrad's alpha must be a number from 0.1 to 10, but got {alpha}.")
        self.alpha = alpha

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        return _fair_weights(G, 1 / self.alpha)


def _fair_weights(G: Array, p: float) -> Array:
    """The w > 0 with `G w ~ w^(-p)` that give an update √(T ‖G‖) long.

    With y = w · length, that is `C y = b y^(-p)`, where C has the cosines and b the lengths to the power p - 1: the
    minimum of a strictly convex function of y. In Newton's steps, y is counted in units of itself.

    Where the gradients cancel, y would grow without bound, while the update shrinks: a ridge on C bounds it.
    """
    lengths = np.sqrt(G.diagonal())
    C = unit_gramian(G) + _RIDGE * np.eye(len(G))
    b = lengths ** (p - 1)
    y: Array = b ** (1 / (1 + p))  # the solution for orthogonal gradients
    for _ in range(_ITERATIONS):
        pull = b * y ** (1 - p)
        downhill = pull - y * (C @ y)
        H = y[:, None] * C * y
        H.flat[:: len(G) + 1] += p * pull
        units = np.sqrt(H.diagonal())
        step = np.linalg.solve(H / np.outer(units, units), downhill / units) / units
        y = _advance(C, b, p, y, step, slope=float(downhill @ step))
        if np.abs(step).max() < 1e-11:
            break
    # The update is `y·C y` long, squared. Taking that from the equation lets it go to zero where it must be.
    size = np.sqrt(len(G) * np.linalg.norm(G) / (y @ (b * y**-p)))
    w: Array = size * y / lengths
    return w


def _advance(C: Array, b: Array, p: float, y: Array, step: Array, slope: float) -> Array:
    """y after the step, or so much of it that y stays positive and the function does not begin to rise steeply."""
    fraction = min(1.0, 0.95 / max(float(-step.min()), 0.95))
    while True:
        new: Array = y * (1 + fraction * step)
        rise = (y * step) @ (C @ new - b * new**-p)
        # So near, Newton's steps need no check, and the rise would be rounding.
        if rise <= 0.5 * slope or np.abs(fraction * step).max() < 0.1:
            return new
        fraction /= 2
