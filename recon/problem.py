"""Task and Problem: what a user brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recon.batches import Batch
from recon.errors import ProblemError

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState

Loss = Callable[[Any, Any], Tensor]
"""`(output, target) -> scalar`."""


@dataclass(frozen=True)
class Metric:
    """A number that says how well a task is done.

    Args:
        name: what the results call it.
        make: gives a fresh accumulator (torchmetrics: `update(output, target)`, `compute()`).
        higher_is_better: the direction in which the metric improves.
    """

    name: str
    make: Callable[[], MetricState]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """A task: its name, its loss `(output, target) -> scalar`, and its metrics."""

    name: str
    loss: Loss
    metrics: Sequence[Metric] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name or "+" in self.name:
            raise ProblemError(
                f"Task name {self.name!r} cannot be used: names become parts of parameter names, so they "
                "must not be empty nor contain '.' or '+'. Rename the task, for example with '_'."
            )
        if not callable(self.loss):
            raise ProblemError(
                f"The loss of task {self.name!r} is {self.loss!r}, which cannot be called. Pass a function (output, "
                "target) -> scalar, such as torch.nn.functional.mse_loss."
            )
        metrics = [metric.name for metric in self.metrics]
        if len(set(metrics)) < len(metrics):
            raise ProblemError(f"Task {self.name!r} needs metrics with different names, but got {metrics}.")


@dataclass(frozen=True)
class Search:
    """How to look for the layers that a problem branches: the settings of Recon's authors, or of one's own.

    Args:
        threshold: S, in (-1, 0], a multiple of 0.01.
        top_k: how many layers are branched.
        epochs: of the profile.
    """

    threshold: float
    top_k: int
    epochs: int


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class Problem:
    """Tasks, a model factory and data loaders.

    Args:
        name: what the command line and the result files call it.
        tasks: the tasks; the model's output has one entry for each.
        make_model: gives a freshly initialised model, `model(inputs) -> {task name: output}`.
        make_loaders: `seed -> (train loader, test loader)`; each yields `(inputs, {task name: target})`.
        make_optimizer: gives the optimizer for a list of parameters.
        make_scheduler: `(optimizer, optimizer steps of the whole training) -> scheduler`, stepped after every
            optimizer step; the learning rate stays as it is when not given.
        epochs: how long a normal training runs, unless the user says otherwise.
        description: one line for `recon problems`.
        example_inputs: gives a few inputs, of any values, without reading the data: costs are counted on them. The
            first batch of the train loader serves where it is not given.
        search: which layers Recon's authors branch, and how they find them; None where they have no say.
        backbone: the name of the network, where it is another than the one that the problem comes with.
    """

    name: str
    tasks: Sequence[Task]
    make_model: Callable[[], nn.Module]
    make_loaders: Callable[[int], tuple[Iterable[Batch], Iterable[Batch]]]
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = field(default=_adam)
    make_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None
    epochs: int = 10
    description: str = ""
    example_inputs: Callable[[], Any] | None = None
    search: Search | None = None
    backbone: str = ""

    def __post_init__(self) -> None:
        odd = [task for task in self.tasks if not isinstance(task, Task)]
        if odd:
            raise ProblemError(
                f"The tasks of problem {self.name!r} hold {odd[0]!r}. Each must be a recon.Task(name, loss, metrics)."
            )
        names = [task.name for task in self.tasks]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ProblemError(f"Problem {self.name!r} needs at least two tasks with different names, but got {names}.")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def losses(self) -> dict[str, Loss]:
        """`{task name: loss}`, as `recon.profile` and `recon.train` take it."""
        return {task.name: task.loss for task in self.tasks}
