"""Methods whose update harms no task, by projection onto the dual cone of the gradients: UPGrad, DualProj.

The dual cone holds the directions d with g_i·d ≥ 0 for every task i. The projection of `u @ J` onto it is `w @ J`,
where w minimises ‖w @ J‖ subject to w ≥ u (Quinton and Rey 2024, Proposition 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recon.methods.aggregators.solvers import factor, min_norm_above
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register


@register(
    "upgrad",
    title="Unconflicting projection of gradients",
    paper="Quinton, Rey, 2024, arXiv 2406.16232, eq. (1)",
    scale="The sum of the projected task gradients (the paper's mean times T): the sum of the task gradients where "
    "none conflict.",
)
class UPGrad(SolvedAggregator):
    """Projects every task's gradient onto the directions that harm no task, and sums.

    Where no direction but zero harms no task, the update is zero. Solved exactly, one problem per task.
    """

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        R = factor(G)
        weights: Array = np.sum([min_norm_above(R, own) for own in np.eye(len(G))], axis=0)
        return weights


@register(
    "dualproj",
    title="Projection onto the dual cone",
    paper="Lopez-Paz, Ranzato, NeurIPS 2017, arXiv 1706.08840, eq. (11), for the sum of the task gradients",
    scale="The projection of the sum of the task gradients: never longer than that, and equal where it harms no task.",
)
class DualProj(SolvedAggregator):
    """The vector nearest to the sum of the task gradients that harms no task.

    Where no direction but zero harms no task, the update is zero.
    """

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        return min_norm_above(factor(G), np.ones(len(G)))
