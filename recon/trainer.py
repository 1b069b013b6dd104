"""train(): any method, on any model, plain or branched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from recon import methods
from recon.batches import model_device, task_outputs, to_device, unpack
from recon.errors import GradientError, ProblemError, UsageError
from recon.methods import Method
from recon.problem import Batch, Loss
from recon.updates import backward

if TYPE_CHECKING:
    from recon.profiler import Profiler


@dataclass
class Epoch:
    """One epoch of training.

    Args:
        number: from 1.
        steps: optimizer steps taken.
        seconds: wall time of the steps, loading included.
        losses: `{task name: mean loss}` over the steps in which the task had a target.
        weights: `{task name: mean weight}` that the method gave the task; empty if it has none.
    """

    number: int
    steps: int
    seconds: float
    losses: dict[str, float]
    weights: dict[str, float]


@dataclass
class History:
    """What happened in a training run, epoch by epoch."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """All optimizer steps taken."""
        return sum(epoch.steps for epoch in self.epochs)

    @property
    def seconds(self) -> float:
        """The wall time of all steps."""
        return sum(epoch.seconds for epoch in self.epochs)


def train(
    model: nn.Module,
    loader: Iterable[Batch],
    losses: Mapping[str, Loss],
    *,
    optimizer: Optimizer,
    method: str | Method = "joint",
    epochs: int = 1,
    scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    profiler: Profiler | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
) -> History:
    """Train `model` in place.

    Args:
        model: `model(inputs) -> {task name: output}`, plain or branched.
        loader: yields `(inputs, {task name: target})`; a task whose target is missing or None is skipped in that step.
        losses: `{task name: (output, target) -> scalar}`; a single entry trains a single-task baseline.
        optimizer: of the model's parameters. A method that learns (uw) gets a group of its own there.
        method: a name (`recon.methods.names()`), a name with options (`"cagrad:c=0.5"`), or a method.
        epochs: passes over the loader.
        scheduler: stepped after every optimizer step; or what makes one of the optimizer, which a method that learns
            needs: a scheduler must know all parameter groups from the start.
        profiler: records conflicts from the gradients of this training.
        on_epoch: called with each epoch's record, for evaluation and checkpoints.
        progress: show a progress bar on stderr.

    Raises:
        ProblemError: model, losses and batches do not fit together.
        GradientError: a loss is not finite, or a task has no gradient anywhere.
        UsageError: no such method, `epochs` below 1, or the optimizer of another model.
    """
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}; train for at least 1.")
    if {p for group in optimizer.param_groups for p in group["params"]}.isdisjoint(model.parameters()):
        raise UsageError(
            "The optimizer holds no parameter of this model: it was made for another one (recon.convert and recon.load "
            "return new models). Make it of model.parameters() anew."
        )
    method = methods.parse(method) if isinstance(method, str) else method
    device = model_device(model)
    method.setup(tuple(losses))
    method.to(device)
    _add_parameters(method, optimizer, scheduler)
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        scheduler = scheduler(optimizer)
    history = History()
    for number in range(1, epochs + 1):
        model.train()
        meter = _Meter(number, device)
        bar = tqdm(loader, desc=f"epoch {number}/{epochs}", leave=False, disable=not progress)
        for batch in bar:
            inputs, targets = to_device(unpack(batch), device)
            step_losses = task_losses(model, inputs, targets, losses)
            if not step_losses:
                continue
            meter.check(step_losses)
            optimizer.zero_grad()
            weights = backward(step_losses, model, method, profiler=profiler)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            meter.add(step_losses, weights)
        method.end_epoch()
        history.epochs.append(meter.epoch(tuple(losses)))
        if on_epoch is not None:
            on_epoch(history.epochs[-1])
    return history


def task_losses(
    model: nn.Module, inputs: Any, targets: Mapping[str, Any], losses: Mapping[str, Loss]
) -> dict[str, Tensor]:
    """`{task name: scalar loss}` of one batch, for the tasks of `losses` that have a target in it.

    Raises:
        ProblemError: the model's output lacks a task, or a loss is not a scalar tensor.
    """
    present = [task for task in losses if targets.get(task) is not None]
    if not present:
        return {}
    outputs = task_outputs(model, inputs, present)
    step_losses = {task: losses[task](outputs[task], targets[task]) for task in present}
    for task, loss in step_losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ProblemError(
                f"The loss of task {task!r} must be a scalar tensor, but is {got}. Reduce it, e.g. mean()."
            )
    return step_losses


def _add_parameters(
    method: Method, optimizer: Optimizer, scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None
) -> None:
    known = {p for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in method.parameters() if p not in known]
    if not new:
        return
    if isinstance(scheduler, LRScheduler):
        raise UsageError(
            f"Method {method.name!r} has parameters of its own, and a scheduler must know them from the start. Pass "
            "what makes the scheduler instead: scheduler=lambda optimizer: ...LR(optimizer, ...)."
        )
    group: dict[str, Any] = {"params": new}
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    optimizer.add_param_group(group)


class _Meter:
    """Sums an epoch's losses and weights on the device, and refuses losses that are not finite."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.device = device
        self.steps = 0
        self.start = time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.weight_sums: dict[str, Tensor] = {}
        self.unchecked: Mapping[str, Tensor] = {}

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Refuse a loss that is not finite before it reaches the weights.

        On a GPU, reading a loss right away would wait for it: there the losses of the step before are read, which
        are known by now.
        """
        losses = {task: loss.detach() for task, loss in losses.items()}
        late, self.unchecked = self.unchecked, losses
        self._refuse_non_finite(losses if self.device.type == "cpu" else late)

    def _refuse_non_finite(self, losses: Mapping[str, Tensor]) -> None:
        if losses and not torch.stack(list(losses.values())).isfinite().all():
            task, loss = next((t, v) for t, v in losses.items() if not v.isfinite())
            raise GradientError(
                f"The loss of task {task!r} is {loss.item()} near step {self.steps + 1} of epoch {self.number}. Lower "
                "the learning rate, or look at this task's loss and targets (log of 0, an empty mask)."
            )

    def add(self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.steps += 1
        for task, loss in losses.items():
            self.sums[task] = self.sums.get(task, 0) + loss.detach().double()
            self.counts[task] = self.counts.get(task, 0) + 1
        for task, weight in weights.items():
            self.weight_sums[task] = self.weight_sums.get(task, 0) + weight.detach()

    def epoch(self, tasks: tuple[str, ...]) -> Epoch:
        """The epoch's record.

        Raises:
            ProblemError: a task never had a target.
        """
        self._refuse_non_finite(self.unchecked)
        never = [task for task in tasks if task not in self.counts]
        if never:
            raise ProblemError(
                f"No batch of epoch {self.number} had a target for {never}. The loader yields (inputs, {{task name: "
                "target}); check the names, and that it is not empty."
            )
        losses = {task: float(self.sums[task]) / self.counts[task] for task in tasks}
        weights = {task: float(total) / self.counts[task] for task, total in self.weight_sums.items()}
        return Epoch(self.number, self.steps, time.perf_counter() - self.start, losses, weights)
