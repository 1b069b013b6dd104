"""Weighting: a method that weighs the losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.method import Method, check_rows


class Weighting(Method):
    """A method that weighs the losses, so that one backward pass is enough."""

    @abstractmethod
    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Combines the losses of one step.

        Args:
            losses: `{task: scalar loss}`. A task that is absent, its target missing from the batch, takes no
                part in the step and keeps its state.

        Returns:
            The scalar to call `backward` on, and `{task: weight}`: detached scalars, what each loss was
            multiplied by.

        Raises:
            UsageError: no losses, a loss that is not a scalar, an unknown task, or no `setup` yet.
        """

    @abstractmethod
    def weights(self, count: int) -> Tensor:
        """(T,) the present weights by position in `tasks`; `count` is T, for use before `setup`."""

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The sum of J's rows, weighted as the losses are at present. See `Method.forward`."""
        return self.row_weights(J) @ J

    def row_weights(self, J: Tensor) -> Tensor:
        """(T,) the present weights of J's rows, one for each of the tasks."""
        check_rows(J)
        if self.tasks and len(J) != len(self.tasks):
            raise UsageError(
                f"Method {self.name!r} needs one gradient for each of the tasks {list(self.tasks)}, "
                f"but got {len(J)} rows."
            )
        return self.weights(len(J)).to(J)

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks' names: state is stored by position, so it fits only the same tasks in the same order."""
        return {"tasks": list(self.tasks)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuses the state of other tasks."""
        self._refuse_other_tasks(state)

    def _stack(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The step's losses in one vector."""
        if not losses:
            raise UsageError("losses is empty: every task's target was missing. Skip such a batch.")
        for task, loss in losses.items():
            if loss.ndim:
                raise UsageError(
                    f"The loss of task {task!r} must be a scalar, but has shape {tuple(loss.shape)}. "
                    "Reduce it, for example with .mean()."
                )
        return torch.stack(list(losses.values()))

    def _positions(self, losses: Mapping[str, Tensor]) -> list[int]:
        """Where the step's tasks are in `tasks`."""
        if not self.tasks:
            raise UsageError(
                f"Method {self.name!r} keeps a state per task: call setup(task names) before the first step."
            )
        return self._indices(losses)

    def _refuse(self, wrong: Tensor, positions: Sequence[int], why: str) -> None:
        """Name the tasks whose losses are wrong, if there are any."""
        names = [self.tasks[i] for i, bad in zip(positions, wrong.tolist(), strict=True) if bad]
        if names:
            raise UsageError(
                f"Method {self.name!r} {why}; those of {names} are not. Choose another weighting for them."
            )
