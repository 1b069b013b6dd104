"""Aggregator: a method that combines the task gradients; GramianAggregator: one that needs their products alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recon.errors import NonFiniteError, UsageError
from recon.methods.bases.method import WHAT_TO_LOOK_AT, Method, check_rows


class Aggregator(Method):
    """A method that combines the task gradients, which takes one backward pass per task.

    This class is for those that need the gradients themselves; most need only their Gramian, see
    `GramianAggregator`.

    Attributes:
        needs_losses: whether `observe_losses` must be called in every step.
        keeps_columns: whether it keeps something by column of J from step to step. Those of sparse gradients are other
            columns in every step.
    """

    needs_losses: bool = False
    keeps_columns: bool = False

    def observe_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Takes note of the step's losses, where `needs_losses`, before the gradients are combined.

        Args:
            losses: `{task: scalar loss}`, detached, of the tasks that take part.
        """

    def combine(self, J: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of a step in which some tasks may be absent.

        Args:
            J: (T, P), the gradients of the tasks that took part, one per row.
            tasks: the rows' task names; all tasks when not given.

        Returns:
            (P,), and `{task: weight}`, what each gradient was multiplied by: empty for a method that has no
            such weights.

        Raises:
            NonFiniteError: a gradient is not finite; the message names the tasks at fault.
        """
        return self(J), {}

    def _positions(self, tasks: Sequence[str] | None, count: int) -> list[int]:
        """Which of all tasks the rows belong to; before `setup`, the rows are all there is."""
        if not self.tasks:
            return list(range(count))
        named = self.tasks if tasks is None else tasks
        indices = self._indices(named)
        if len(named) != count:
            raise UsageError(
                f"Method {self.name!r} needs one gradient for each of the tasks {list(named)}, but got {count} rows."
            )
        return indices

    def _check(self, J: Tensor, tasks: Sequence[str] | None) -> None:
        """Refuses a tensor that is not (T, P), and gradients that are not finite; finite ones are read only once."""
        check_rows(J)
        if not J.sum(dim=1).isfinite().all() and not (finite := J.isfinite().all(dim=1)).all():
            raise NonFiniteError(non_finite((~finite).nonzero().flatten().tolist(), self._names(tasks, len(J))))

    def _names(self, tasks: Sequence[str] | None, count: int) -> Sequence[str]:
        """The rows' task names, if they are known."""
        names = self.tasks if tasks is None else tasks
        return names if len(names) == count else ()


class GramianAggregator(Aggregator):
    """An aggregator whose update is `weights(J Jᵀ) @ J`: it never sees more than T² numbers."""

    @abstractmethod
    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """What to multiply each task gradient with.

        Args:
            gramian: (T, T), the inner products of the task gradients.
            tasks: the rows' task names, for the error message.

        Returns:
            (T,), on the Gramian's device and in its dtype.

        Raises:
            NonFiniteError: the Gramian is not finite; the message names the tasks at fault.
            UsageError: not a square matrix.
        """

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The update for one step. See `Method.forward`."""
        check_rows(J)
        # Squared norms of float32 gradients leave float32 at norms of 1e-23 and 1e19.
        rows = J.double()
        return self.weights(rows @ rows.T).to(J) @ J

    def _finite(self, gramian: Tensor, tasks: Sequence[str] | None) -> Tensor:
        """The Gramian on the CPU in float64, where the solvers work; refused if it is not finite."""
        if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
            raise UsageError(f"Expected a Gramian of shape (T, T), but got {tuple(gramian.shape)}.")
        G = gramian.detach().cpu().double()
        if not G.isfinite().all():
            # One bad gradient spoils its whole row and column; only the diagonal shows whose it was.
            bad = (~G.diagonal().isfinite()).nonzero().flatten().tolist()
            bad = bad or (~G.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise NonFiniteError(non_finite(bad, self._names(tasks, len(G))))
        return G


def non_finite(bad: Sequence[int], tasks: Sequence[str]) -> str:
    """The message on task gradients that are not finite, by their rows, and their names if they are known."""
    named = ", ".join(f"{i} ({tasks[i]!r})" if tasks else f"{i}" for i in bad)
    return (
        f"The gradient of task {named} is not finite, so there is no update that is right for all tasks. "
        f"{WHAT_TO_LOOK_AT}"
    )
