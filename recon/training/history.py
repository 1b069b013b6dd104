"""Epoch and History: the record of a training run, and the sums that it is computed from."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recon.errors import GradientError, ProblemError
from recon.problems.losses import TaskLosses
from recon.support.network.forward import Batch
from recon.support.processes import gather, rank, world_size
from recon.training.batches.absent import nothing_for

logger = logging.getLogger(__name__)


@dataclass
class Epoch:
    """One epoch of training.

    Args:
        number: from 1.
        steps: optimizer steps taken; fewer than the other epochs' if the training was stopped in this one.
        skipped: steps left out because a gradient overflowed in float16.
        seconds: wall time of the steps, loading included. Saving checkpoints does not count, nor does what an
            interruption lost, nor drawing batches again to get back to where it was.
        losses: `{task name: mean loss}` over the steps in which the task had a target.
        weights: `{task name: mean weight}` that the method gave the task, over the steps in which it had one; empty if
            the method has none.
        results: `{task name: {metric name: value}}` after the epoch, if `on_epoch` evaluated the model and put them
            here.
    """

    number: int
    steps: int
    seconds: float
    losses: dict[str, float]
    weights: dict[str, float]
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0


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


class EpochMeter:
    """Sums an epoch's losses and weights on the device, and refuses losses that are not finite."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.device = device
        self.steps = self.skipped = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.weight_sums: dict[str, Tensor] = {}
        self.weight_counts: dict[str, int] = {}
        self.unchecked: list[Mapping[str, Tensor]] = []
        self._seconds = 0.0
        self._start: float | None = None

    def start(self) -> None:
        """Let the clock run, if it does not yet."""
        if self._start is None:
            self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """What the clock shows."""
        return self._seconds + (0.0 if self._start is None else time.perf_counter() - self._start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the clock stand still."""
        runs = self._start is not None
        self._seconds, self._start = self.seconds, None
        try:
            yield
        finally:
            if runs:
                self.start()

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Refuse a loss that is not finite before it reaches the weights.

        Where reading a loss would wait for a GPU, or one rank alone would know of it, this is left to `check_pending`.
        """
        self.unchecked.append({task: loss.detach() for task, loss in losses.items()})
        if self.device.type == "cpu" and world_size() == 1:
            self.check_pending()

    def check_pending(self) -> None:
        """Check the losses that `check` left for later; every rank must call it in the same step."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked:  # between two steps: one rank alone may ask
            return
        bad = {t: v.item() for losses in unchecked for t, v in losses.items() if not v.isfinite()}
        for task, loss in [item for found in gather(bad) for item in found.items()][:1]:
            raise GradientError(
                f"The loss of task {task!r} is {loss} in step {self.steps + 1} of epoch {self.number}. Lower the "
                "learning rate, or look at this task's loss and targets (log of 0, an empty mask)."
            )

    def add(self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Count a batch."""
        for task, loss in losses.items():
            self.sums[task] = self.sums.get(task, 0) + loss.detach().double()
            self.counts[task] = self.counts.get(task, 0) + 1
        for task in losses.keys() & weights.keys():
            self.weight_sums[task] = self.weight_sums.get(task, 0) + weights[task].detach()
            self.weight_counts[task] = self.weight_counts.get(task, 0) + 1

    def mean_losses(self) -> dict[str, float]:
        """`{task: mean loss}` of the epoch so far on this rank; waits for the device."""
        return {task: float(total) / self.counts[task] for task, total in self.sums.items()}

    def epoch(self) -> Epoch:
        """The record of the epoch so far on this rank, of the tasks that had a target in it."""
        return self._record(*self._totals())

    def _totals(self) -> tuple[Mapping[str, float], ...]:
        return self.counts, _floats(self.sums), self.weight_counts, _floats(self.weight_sums)

    def _record(
        self,
        counts: Mapping[str, float],
        sums: Mapping[str, float],
        weight_counts: Mapping[str, float],
        weight_sums: Mapping[str, float],
    ) -> Epoch:
        losses = {task: total / counts[task] for task, total in sums.items()}
        weights = {task: total / weight_counts[task] for task, total in weight_sums.items()}
        return Epoch(self.number, self.steps, self.seconds, losses, weights, skipped=self.skipped)

    def whole_epoch(self, losses: TaskLosses, loader: Iterable[Batch]) -> Epoch:
        """The record of an epoch that went through all batches, over all ranks; each task must have had a target."""
        tasks = losses.tasks
        everyone = gather(self._totals())
        counts, *others = (_added_up(tables, tasks) for tables in zip(*everyone, strict=True))
        never = [task for task in tasks if task not in counts]
        if never and not counts and self.number > 1:
            raise ProblemError(
                f"The loader gave no batch in epoch {self.number}. A loader that can be used only once, such as a "
                "generator, lasts one epoch: pass a DataLoader or a list."
            )
        if never:
            raise nothing_for(never, f"of epoch {self.number}", losses, loader)
        self._warn_of_nothing(others[0])
        return self._record(counts, *others)

    def _warn_of_nothing(self, sums: Mapping[str, float]) -> None:
        """A loss that is always 0 looks like one that is learned."""
        nothing = [task for task, total in sums.items() if total == 0]
        if nothing and self.number == 1 and rank() == 0:
            logger.warning(
                "The loss of %s was exactly 0 in every step of epoch 1. If nothing is labelled there, leave the target "
                "out of the batch, or let it be None: the task then takes no part.",
                nothing,
            )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {
            "number": self.number,
            "steps": self.steps,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "sums": self.sums,
            "counts": self.counts,
            "weight_sums": self.weight_sums,
            "weight_counts": self.weight_counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.number, self.steps, self.skipped = state["number"], state["steps"], state["skipped"]
        self._seconds, self._start = state["seconds"], None
        self.counts, self.weight_counts = dict(state["counts"]), dict(state["weight_counts"])
        self.sums = {task: total.to(self.device) for task, total in state["sums"].items()}
        self.weight_sums = {task: total.to(self.device) for task, total in state["weight_sums"].items()}


def _floats(sums: Mapping[str, Tensor]) -> dict[str, float]:
    return {task: float(total) for task, total in sums.items()}


def _added_up(tables: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    return {task: sum(table.get(task, 0) for table in tables) for task in tasks if any(task in t for t in tables)}
