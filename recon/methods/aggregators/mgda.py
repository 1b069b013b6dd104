"""MGDA: the shortest vector in the convex hull of the task gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from recon.errors import UsageError
from recon.methods.aggregators.solvers import factor, min_norm_weights, unit_gramian
from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.registry import register

_NORMALIZATIONS = ("none", "l2", "loss", "loss+")


@register(
    "mgda",
    title="Multiple-gradient descent",
    paper="Désidéri, C. R. Math. 350, 2012; Sener, Koltun, NeurIPS 2018, arXiv 1810.04650, eq. (3)",
    scale="T times the shortest convex combination of the task gradients: never longer than their sum.",
)
class MGDA(SolvedAggregator):
    """The shortest vector in the convex hull of the task gradients, times T.

    It is zero exactly where no direction helps all tasks. A task whose gradient is zero, which any direction leaves as
    it is, is left out: the others train on. Solved exactly: the usual Frank-Wolfe iteration stops far from the optimum
    where gradients differ in length.

    Args:
        normalize: what the gradients are divided by to find the weights, which are then applied to the gradients as
            they are, as in Sener and Koltun's code: "l2", their norms; "loss", the losses; "loss+", both. Without it,
            the shortest gradient gets most of the weight.

    Raises:
        UsageError: `normalize` is something else; with "loss" or "loss+", a loss is not above 0.
    """

    def __init__(self, normalize: str = "none") -> None:
        super().__init__()
        if normalize not in _NORMALIZATIONS:
            raise UsageError(f"MGDA's normalize must be one of {', '.join(_NORMALIZATIONS)}, but got {normalize!r}.")
        self.normalize = normalize
        self.needs_losses = normalize in ("loss", "loss+")
        self._losses: dict[str, float] = {}

    def observe_losses(self, losses: Mapping[str, Tensor]) -> None:
        """See `Aggregator.observe_losses`."""
        self._losses = {task: float(loss) for task, loss in losses.items()}
        bad = [task for task, loss in self._losses.items() if not loss > 0]
        if bad:
            raise UsageError(
                f"MGDA with normalize={self.normalize!r} divides by losses that are above 0; those of {bad} are not. "
                "Use normalize='l2'."
            )

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        if self.normalize in ("l2", "loss+"):
            G = unit_gramian(G)
        if self.needs_losses:
            losses = np.array([self._loss(position) for position in positions])
            G = G / np.outer(losses, losses)
        return len(G) * min_norm_weights(factor(G))

    def _loss(self, position: int) -> float:
        task = self.tasks[position] if self.tasks else str(position)
        if task not in self._losses:
            raise UsageError(
                f"MGDA with normalize={self.normalize!r} does not know the loss of {task!r}: call observe_losses "
                "before. recon.backward does."
            )
        return self._losses[task]
