"""Task and Problem: what a user brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recon.errors import ProblemError
from recon.problems.losses import BatchLoss, Loss, LossOfBatch, LossOfEach, TaskLosses, of_batch
from recon.support.network.forward import Batch
from recon.support.network.outputs import check_names, name_outputs

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState


@dataclass(frozen=True)
class Metric:
    """A number that says how well the model does a task.

    Args:
        name: what the results call it.
        make: makes a fresh accumulator (torchmetrics: `update(output, target)`, `compute()`).
        higher_is_better: the direction in which the metric improves.
    """

    name: str
    make: Callable[[], MetricState]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """A task: its name, its loss `(output, target) -> scalar`, and its metrics.

    The loss may be None in a batch from which the task is absent. In a problem with `batch_loss`, a task has no loss of
    its own, but metrics.
    """

    name: str
    loss: Loss = of_batch
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
            raise ProblemError(f"The metrics of task {self.name!r} need different names, but have {metrics}.")


@dataclass(frozen=True)
class Search:
    """How to look for the layers that a problem branches: the settings of Recon's authors, or your own.

    Args:
        threshold: S, in (-1, 0], a multiple of 0.01.
        top_k: how many layers are branched.
        epochs: of the profile.
    """

    threshold: float
    top_k: int
    epochs: int


@dataclass(frozen=True)
class ReducedRun:
    """How long `recon bench --preset quick` trains a problem: minutes on a CPU.

    Args:
        epochs: of every training; the profile has one.
        train_batches: at most so many of an epoch's batches; all if None.
        test_batches: at most so many of the test batches; all if None.
        timing_rounds: how often each training step is timed.
        schedule: of the learning rate, by its name on the command line, such as "one-cycle"; the problem's own if None.
    """

    epochs: int = 3
    train_batches: int | None = 200
    test_batches: int | None = 100
    timing_rounds: int = 4
    schedule: str | None = None


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class Problem:
    """Tasks, a model factory and data loaders.

    Args:
        name: what the command line and the result files call it.
        tasks: the tasks; the model's output has one entry for each.
        make_model: makes a freshly initialised model, `model(inputs) -> {task name: output}`.
        make_loaders: `seed -> (train loader, test loader)`; each yields `(inputs, {task name: target})`, or
            `{task name: (inputs, target)}`. Tasks that have loaders of their own are joined by `recon.joint_loader`.
        make_optimizer: makes the optimizer of these parameters. Where it is Adam or AdamW, which take no sparse
            gradients, embeddings with `sparse=True` are left to a SparseAdam with the same learning rate.
        make_scheduler: `(optimizer, optimizer steps of the whole training) -> scheduler`, stepped after every
            optimizer step. Without it, the learning rate stays as it is.
        epochs: how long a normal training runs, unless the user says otherwise.
        description: one line for `recon problems`.
        example_inputs: makes a few inputs, of any values, without reading the data: costs are counted on them. Without
            it, costs are counted on the first batch of the train loader.
        batch_loss: `(outputs, batch) -> {task name: scalar}`, in place of the tasks' own losses: one function of all
            that the model returns and of the whole batch, `(inputs, targets)`; see `recon.train`. Each task needs a
            metric then.
        output_names: for a model that returns a tuple or a list: the names of what is in there, in order. Those of the
            tasks must be among them.
        search: which layers Recon's authors branch, and how they find them; None where they do not say.
        backbone: the name of the network, if it is not the one that the problem comes with.
        quick: how long `recon bench --preset quick` trains.
        cagrad_c: the c that Recon's authors give CAGrad (their alpha, appendix B), for `recon bench --preset paper`;
            CAGrad's default if None.
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
    quick: ReducedRun = field(default_factory=ReducedRun)
    cagrad_c: float | None = None
    batch_loss: BatchLoss | None = None
    output_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        odd = [task for task in self.tasks if not isinstance(task, Task)]
        if odd:
            raise ProblemError(
                f"The tasks of problem {self.name!r} hold {odd[0]!r}. Each must be a recon.Task(name, loss, metrics)."
            )
        names = [task.name for task in self.tasks]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ProblemError(
                f"Problem {self.name!r} needs at least two tasks, with different names, but has {names}."
            )

        self._check_losses()
        if self.output_names is not None:
            self._name_outputs(self.output_names)

    def _check_losses(self) -> None:
        if self.batch_loss is None:
            without = [task.name for task in self.tasks if task.loss is of_batch]
            if without:
                raise ProblemError(
                    f"Task {without[0]!r} of problem {self.name!r} has no loss. Give it one, or the problem a "
                    "batch_loss."
                )
            return
        if not callable(self.batch_loss):
            raise ProblemError(
                f"batch_loss of problem {self.name!r} is {self.batch_loss!r}, which cannot be called. Pass a function "
                "(outputs, batch) -> {task name: scalar}."
            )
        for task in self.tasks:
            if task.loss is not of_batch or not task.metrics:
                wrong = "has no metric" if task.loss is of_batch else "has a loss of its own, too"
                raise ProblemError(
                    f"Problem {self.name!r} has a batch_loss, but its task {task.name!r} {wrong}. Pass "
                    "recon.Task(name, metrics=[...]): the loss comes from batch_loss, the results from the metrics."
                )

    def _name_outputs(self, names: Sequence[str]) -> None:
        check_names(names)
        missing = [name for name in self.task_names if name not in names]
        if missing:
            raise ProblemError(
                f"output_names of problem {self.name!r} is {tuple(names)}, without the task {missing[0]!r}. Name what "
                "the model returns, in order; an output that is a task's has the task's name."
            )
        if not isinstance(self.make_model, _NamingFactory):
            object.__setattr__(self, "make_model", _NamingFactory(self.make_model, tuple(names)))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def losses(self) -> dict[str, Loss] | TaskLosses:
        """`{task name: loss}`, or the loss of the whole batch: as `recon.profile` and `recon.train` need it."""
        if self.batch_loss is not None:
            return LossOfBatch(self.batch_loss, self.task_names, self.task_names)
        return {task.name: task.loss for task in self.tasks}

    def losses_of(self, tasks: Iterable[str]) -> TaskLosses:
        """The losses of these tasks alone."""
        losses = self.losses
        return (losses if isinstance(losses, TaskLosses) else LossOfEach(losses)).only(tasks)


@dataclass(frozen=True)
class _NamingFactory:
    """Makes models whose outputs have names."""

    make_model: Callable[[], nn.Module]
    names: tuple[str, ...]

    def __call__(self) -> nn.Module:
        model = self.make_model()
        return name_outputs(model, self.names) if isinstance(model, nn.Module) else model
