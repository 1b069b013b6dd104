"""Method: the base class of all that combines the losses, or the gradients, of the tasks."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recon.errors import UnknownNameError, UsageError

WHAT_TO_LOOK_AT = (
    "Look at that task's loss on this batch: a logarithm, root or division of zero, an empty mask, an overflow in "
    "float16, or torch.where over NaN targets, whose gradient is NaN though its value is not (choose the labelled "
    "entries before the loss: mask = ~target.isnan(); loss(output[mask], target[mask])). Or lower the learning rate."
)
"""The usual causes of a gradient that is not finite."""


class Method(nn.Module, ABC):
    """A way to turn the losses or gradients of several tasks into one update, in sum scale.

    Sum scale means that tasks which agree change nothing: where all T of them have the gradient g, the update
    is T·g, as it is for the sum of the losses. The entry of a method in the registry says so, or what it does
    instead.

    Attributes:
        name: what the registry calls it.
        needs_new_losses: whether `after_step` must be called.
        scale_free: whether its weights stay the same when all losses of a step are multiplied by a number, even by
            another number in each step.
        memoryless: whether a step depends on no earlier step, except for the position in a random stream. Such a method
            may be given to `recon.backward` by its name.
        works_alone: whether it does what it is for in steps of a single task, too. Others act between the tasks of a
            step, and do nothing, or nothing but change its length, where there is one.
        tasks: all task names of the run, in order; empty before `setup`.
    """

    name: str = ""
    needs_new_losses: bool = False
    scale_free: bool = False
    memoryless: bool = False
    works_alone: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()

    def setup(self, tasks: Sequence[str]) -> None:
        """Names all tasks of the run; called once, before the first step and before `load_state_dict`.

        The state made here lies on the CPU: move the method with `.to(device)` afterwards.

        Raises:
            UsageError: no tasks, a task named twice, or other tasks than those of an earlier call.
        """
        tasks = tuple(tasks)
        if not tasks or len(set(tasks)) < len(tasks):
            raise UsageError(f"Method {self.name!r} needs the names of all tasks, each once, but got {list(tasks)}.")
        if self.tasks == tasks:
            return
        if self.tasks:
            raise UsageError(
                f"Method {self.name!r} was set up for the tasks {list(self.tasks)} and cannot change to "
                f"{list(tasks)}. Make a new one with recon.methods.get({self.name!r})."
            )
        self.tasks = tasks
        self._create_state()

    def _create_state(self) -> None:
        """Makes the parameters and buffers whose size depends on `self.tasks`."""

    def settings(self) -> dict[str, Any]:
        """The options it was made with, as plain values: what must be the same where a training goes on."""
        options = {option: getattr(self, option, None) for option in inspect.signature(type(self)).parameters}
        return {o: value for o, value in options.items() if value is None or isinstance(value, (bool, int, float, str))}

    def _indices(self, tasks: Iterable[str]) -> list[int]:
        """The positions of these tasks in `tasks`."""
        tasks = list(tasks)
        for task in tasks:
            if task not in self.tasks:
                hint = "If the first batch lacked it, name all tasks before the first step: method.setup([...])."
                raise UnknownNameError("task", task, self.tasks, hint)
        return [self.tasks.index(task) for task in tasks]

    def _refuse_other_tasks(self, state: Mapping[str, Any]) -> None:
        if tuple(state["tasks"]) != self.tasks:
            raise UsageError(
                f"The saved state of method {self.name!r} belongs to the tasks {state['tasks']}, but the "
                f"method is set up for {list(self.tasks)}. Call setup for the same tasks, then load_state_dict."
            )

    def attach(self, model: nn.Module) -> None:
        """Called once, before the first forward pass: a method that lives inside the model takes its place there."""

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Called after the step, if `needs_new_losses`, with the losses that it led to.

        Args:
            losses: `{task: scalar loss}`, detached, of the same batch after the optimizer's step.
        """

    def end_epoch(self) -> None:
        """Called once at the end of every epoch."""

    @abstractmethod
    def forward(self, J: Tensor) -> Tensor:
        """The update for one step.

        Args:
            J: (T, P), one task gradient per row.

        Returns:
            (P,), on J's device and in its dtype.
        """


def check_rows(J: Tensor) -> None:
    """Refuse a tensor that is not one gradient per row."""
    if J.ndim != 2 or not len(J):
        raise UsageError(f"Expected task gradients of shape (T, P), one task per row, but got {tuple(J.shape)}.")
