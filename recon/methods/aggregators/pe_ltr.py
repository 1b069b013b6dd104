"""PE-LTR: Pareto-efficient weights, none of which falls below a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from recon.errors import UsageError
from recon.methods.aggregators.solvers import RANK_TOLERANCE, factor
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register


@register(
    "pe-ltr",
    title="Pareto-efficient learning to rank",
    paper="Lin, Chen, Pei, Sun, Xiao, Sun, Zhang, Ou, Jiang, RecSys 2019, Algorithm 2",
    scale="The weights add up to T (the paper's to 1).",
)
class PELTR(SolvedAggregator):
    """The weights of the shortest combination of the gradients, under lower bounds c, as the paper approximates them.

    The problem is to minimise ‖ω @ J‖ subject to Σ ω = 1 and ω ≥ c. The paper solves it in two steps: first with
    the equality alone, the KKT system of which is linear in ω - c; then that solution is projected onto the ω - c ≥ 0
    with the right sum, by least squares. With three tasks or more, that need not be the minimum: see `mgda` for c = 0.

    Args:
        bound: every task's least weight, as a share of 1. T of them must add up to less than 1.
        bounds: the tasks' least weights, one by one, in place of `bound`: a sequence in the order of the tasks, or
            "0.1/0.2/0.1" on the command line.

    Raises:
        UsageError: a bound is negative, or they add up to 1 or more, or they are not one for each task.
    """

    def __init__(self, bound: float = 0.0, bounds: Sequence[float] | str | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.bounds = None if bounds is None else _numbers(bounds)
        _check([bound] if self.bounds is None else self.bounds)

    def _create_state(self) -> None:
        self._lowest(range(len(self.tasks)))

    def _lowest(self, positions: Sequence[int]) -> Array:
        count = len(self.tasks) or len(positions)
        bounds = [self.bound] * count if self.bounds is None else self.bounds
        if len(bounds) != count:
            raise UsageError(f"PE-LTR needs one bound for each of {count} tasks, but got {list(bounds)}.")
        _check(bounds)
        return np.array([self.bound if self.bounds is None else bounds[position] for position in positions])

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        lowest = self._lowest(positions)
        room = 1 - lowest.sum()
        return len(G) * (lowest + _project_onto_simplex(_relaxed(G, lowest, room), room))


def _relaxed(G: Array, lowest: Array, room: float) -> Array:
    """The v with Σ v = room that minimises ‖R (v + lowest)‖, of least norm.

    It is what the pseudo-inverse of the paper's KKT system gives, but as v = room / T + N z, where N spans the vectors
    that add up to zero, which needs no squares of R.
    """
    count = len(G)
    R = factor(G, RANK_TOLERANCE)
    N = np.linalg.svd(np.ones((1, count)))[2][1:].T
    v = np.full(count, room / count)
    if count > 1:
        U, sizes, V = np.linalg.svd(R @ N, full_matrices=False)
        inverse = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > RANK_TOLERANCE * np.linalg.norm(R))
        v = v - N @ (V.T @ (inverse * (U.T @ (R @ (v + lowest)))))
    return v


def _project_onto_simplex(v: Array, total: float) -> Array:
    """The vector nearest to v that is non-negative and adds up to `total`: v less a constant, cut off at zero."""
    falling = np.sort(v)[::-1]
    shifts = (falling.cumsum() - total) / np.arange(1, len(v) + 1)
    projected: Array = (v - shifts[falling > shifts][-1]).clip(min=0)
    return projected


def _numbers(bounds: Sequence[float] | str | float) -> tuple[float, ...]:
    parts = bounds.split("/") if isinstance(bounds, str) else [bounds] if isinstance(bounds, (int, float)) else bounds
    try:
        return tuple(map(float, parts))
    except (TypeError, ValueError):
        raise UsageError(f"PE-LTR's bounds must be numbers, such as '0.1/0.2/0.1', but got {bounds!r}.") from None


def _check(bounds: Sequence[float]) -> None:
    if not all(0 <= bound < math.inf for bound in bounds) or sum(bounds) >= 1:
        raise UsageError(
            f"PE-LTR's bounds must be at least 0 and add up to less than 1, but got {', '.join(map(str, bounds))}. "
            "Lower them: equal weights are 1/T each."
        )
