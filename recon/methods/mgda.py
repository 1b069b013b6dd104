"""MGDA: the shortest vector in the convex hull of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence

from recon.errors import UsageError
from recon.methods._solvers import factor, min_norm_weights, unit_gramian
from recon.methods.registry import register
from recon.methods.solved import Array, SolvedAggregator


@register(
    "mgda",
    title="Multiple-gradient descent",
    paper="Désidéri, C. R. Math. 350, 2012; Sener, Koltun, NeurIPS 2018, arXiv 1810.04650, eq. (3)",
    scale="T times the shortest convex combination of the task gradients: never longer than their sum.",
)
class MGDA(SolvedAggregator):
    """The shortest vector in the convex hull of the task gradients, times T.

    It is zero exactly where no direction helps all tasks, so also where one task's gradient is zero. Solved
    exactly: the usual Frank-Wolfe iteration stops far from the optimum where gradients differ in length.

    Args:
        normalize: "l2" finds the weights for the gradients divided by their norms, and then applies them to the
            gradients as they are, as Sener and Koltun's code does; without it, the shortest gradient gets most of the
            weight. (The code's other forms divide by the losses, which an aggregator does not see.)

    Raises:
        UsageError: `normalize` is neither "none" nor "l2".
    """

    def __init__(self, normalize: str = "none") -> None:
        super().__init__()
        if normalize not in ("none", "l2"):
            raise UsageError(f"MGDA's normalize must be 'none' or 'l2', but got {normalize!r}.")
        self.normalize = normalize

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        return len(G) * min_norm_weights(factor(unit_gramian(G) if self.normalize == "l2" else G))
