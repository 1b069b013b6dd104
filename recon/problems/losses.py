"""The losses of the tasks: a function for each, or one function of the whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recon.errors import ProblemError, UsageError, type_name
from recon.support.network.forward import Part, tasks_of

Loss = Callable[[Any, Any], Any]
"""`(output, target) -> scalar`; None if the task is absent in this batch after all."""

BatchLoss = Callable[[Mapping[str, Any], Part], Mapping[str, "Tensor | None"]]
"""`(outputs, (inputs, targets)) -> {task name: scalar}`; a task that is left out, or None, is absent in this batch."""

Losses = Mapping[str, Loss] | BatchLoss
"""What training and profiling accept: `{task name: loss}`, or one function of the whole batch."""


class TaskLosses(ABC):
    """The losses of `tasks`, in this order."""

    tasks: tuple[str, ...]

    @abstractmethod
    def present(self, part: Part) -> list[str]:
        """The tasks that have a target in a part of a batch."""

    @abstractmethod
    def needed(self, part: Part) -> Sequence[str] | None:
        """The tasks whose outputs are needed for the losses of a part; none: it need not be run; None: all outputs."""

    @abstractmethod
    def of(self, outputs: Mapping[str, Any], part: Part) -> dict[str, Tensor]:
        """`{task name: scalar loss}` of the tasks that are present."""

    @abstractmethod
    def only(self, tasks: Iterable[str]) -> TaskLosses:
        """The losses of these tasks alone."""

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The losses that are modules."""


@dataclass(frozen=True)
class LossOfEach(TaskLosses):
    """A function for each task."""

    functions: Mapping[str, Loss]

    @property
    def tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `TaskLosses`."""
        return tuple(self.functions)

    def present(self, part: Part) -> list[str]:
        """See `TaskLosses.present`."""
        return tasks_of(part, self.functions)

    def needed(self, part: Part) -> Sequence[str]:
        """See `TaskLosses.needed`."""
        return self.present(part)

    def of(self, outputs: Mapping[str, Any], part: Part) -> dict[str, Tensor]:
        """See `TaskLosses.of`."""
        return _scalars({task: self.functions[task](outputs[task], part.targets[task]) for task in self.present(part)})

    def only(self, tasks: Iterable[str]) -> TaskLosses:
        """See `TaskLosses.only`."""
        chosen = set(tasks)
        return LossOfEach({task: loss for task, loss in self.functions.items() if task in chosen})

    @property
    def modules(self) -> list[nn.Module]:
        """See `TaskLosses.modules`."""
        return [loss for loss in self.functions.values() if isinstance(loss, nn.Module)]


@dataclass(frozen=True)
class LossOfBatch(TaskLosses):
    """One function of the whole batch, which may know losses of more tasks than it is asked for."""

    function: BatchLoss
    tasks: tuple[str, ...]
    known: tuple[str, ...]

    def present(self, part: Part) -> list[str]:
        """Those that the targets name; all, where they name none: only the function knows."""
        return tasks_of(part, self.tasks) or list(self.tasks)

    def needed(self, part: Part) -> None:
        """See `TaskLosses.needed`."""
        return

    def of(self, outputs: Mapping[str, Any], part: Part) -> dict[str, Tensor]:
        """See `TaskLosses.of`."""
        losses = self.function(outputs, part)
        if not isinstance(losses, Mapping):
            raise ProblemError(
                f"The loss of the whole batch must return {{task name: scalar loss}}, but returned {type_name(losses)}."
            )
        for task in losses:
            if task not in self.known:
                raise ProblemError(
                    f"The loss of the whole batch returned one for {task!r}, which is no task; the tasks are "
                    f"{', '.join(map(repr, self.known))}. Leave it out, or name it among the tasks."
                )
        return _scalars({task: losses[task] for task in self.tasks if task in losses})

    def only(self, tasks: Iterable[str]) -> TaskLosses:
        """See `TaskLosses.only`."""
        chosen = set(tasks)
        return LossOfBatch(self.function, tuple(task for task in self.tasks if task in chosen), self.known)

    @property
    def modules(self) -> list[nn.Module]:
        """See `TaskLosses.modules`."""
        return [self.function] if isinstance(self.function, nn.Module) else []


def of_batch(output: Any, target: Any) -> Tensor:
    """Stands for the loss of a task whose problem has one function for the losses of the whole batch."""
    raise ProblemError(
        "This task has no loss of its own: its problem's batch_loss gives the losses of the whole batch."
    )


def as_losses(losses: Losses | TaskLosses, tasks: Sequence[str] | None = None) -> TaskLosses:
    """The losses, whichever way they were given.

    Args:
        losses: `{task name: (output, target) -> scalar}`, or `(outputs, batch) -> {task name: scalar}`.
        tasks: the names of the tasks, which a function of the whole batch needs.

    Raises:
        UsageError: `losses` is neither, or `tasks` is missing or names other tasks.
    """
    if isinstance(losses, TaskLosses):
        return losses
    if isinstance(losses, (Mapping, nn.ModuleDict)):
        functions: dict[str, Any] = dict(losses.items())
        if tasks is not None and set(tasks) != set(functions):
            raise UsageError(f"tasks is {list(tasks)}, but losses has the tasks {list(functions)}. Leave tasks out.")
        for task, loss in functions.items():
            if not callable(loss):
                raise UsageError(
                    f"The loss of task {task!r} is {loss!r}, which cannot be called. Pass a function (output, target) "
                    "-> scalar, such as torch.nn.functional.mse_loss."
                )
        return LossOfEach(functions)
    if not callable(losses):
        raise UsageError(
            f"losses is a {type_name(losses)}. Pass {{task name: (output, target) -> scalar}}, or a function (outputs, "
            "batch) -> {task name: scalar}."
        )
    if tasks is None or isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tuple(tasks)):
        raise UsageError(
            f"losses is a function of the whole batch, so name the tasks, each once: tasks=('seg', 'depth'). tasks is "
            f"{tasks!r}."
        )
    return LossOfBatch(losses, tuple(tasks), tuple(tasks))


def _scalars(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those that are not None; each must be a scalar tensor."""
    present = {task: loss for task, loss in losses.items() if loss is not None}
    for task, loss in present.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ProblemError(
                f"The loss of task {task!r} must be a scalar tensor, but is {got}. Reduce it, e.g. mean()."
            )
    return present
