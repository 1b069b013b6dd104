"""Methods that put the tasks on an equal footing in closed form: IMTL-G and ConFIG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recon.methods.aggregators.solvers import RANK_TOLERANCE, unit_gramian
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register


@register(
    "imtl-g",
    title="Impartial multi-task learning, the gradient part",
    paper="Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, ICLR 2021, eq. (6)",
    scale="The weights add up to T (the paper's to 1).",
)
class IMTLG(SolvedAggregator):
    """The combination with equal projections onto all gradients' directions, and weights that add up to T.

    With the cosines C and the lengths ℓ, the weights are proportional to `C⁺ 1 / ℓ`; the pseudo-inverse is used
    where the gradients are dependent. Weights may be negative. With three tasks or more of very different
    lengths, the sum of `C⁺ 1 / ℓ` can be negative too: the paper's rule then makes the projections negative, and
    the step climbs. `config` has the same direction, always downhill. A task whose gradient is zero is left out.
    """

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        weights = equal_projections(G) / np.sqrt(G.diagonal())
        total = weights.sum()
        if abs(total) <= 1e-12 * np.abs(weights).sum():
            return np.zeros_like(weights)
        scaled: Array = len(weights) / total * weights
        return scaled


@register(
    "config",
    title="Conflict-free inverse gradients",
    paper="Liu, Chu, Thuerey, ICLR 2025, arXiv 2408.11104, eq. (2)",
    scale="As long as the projection of the sum of the task gradients onto the update's direction.",
)
class ConFIG(SolvedAggregator):
    """The direction with equal cosines with all gradients, as long as the sum of the gradients reaches in it.

    Where the gradients are dependent, so that there may be no such direction, the cosines are equal in the sense of
    least squares. A task whose gradient is zero is left out.
    """

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        weights = equal_projections(G) / np.sqrt(G.diagonal())
        square = weights @ G @ weights
        if square <= 0:
            return np.zeros_like(weights)
        scaled: Array = (G @ weights).sum() / square * weights
        return scaled


def equal_projections(G: Array) -> Array:
    """How much of each unit gradient gives a vector whose projections onto all of them are 1."""
    weights: Array = np.linalg.pinv(unit_gramian(G), rcond=RANK_TOLERANCE, hermitian=True).sum(axis=1)
    return weights
