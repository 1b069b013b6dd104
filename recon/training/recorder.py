"""Recorder: what happened in every step of a training, as a file of one JSON object a line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon.errors import CheckpointError
from recon.support.files.documents import Document, json_values, read_documents
from recon.support.files.whole import write_from
from recon.support.processes import rank
from recon.training.history import Epoch

logger = logging.getLogger(__name__)

_MOST_STEPS = 1000  # lines kept in memory before they are written


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    epoch: int  # from 1
    number: int  # counted through all epochs, from 1
    losses: Mapping[str, Tensor]  # means over the step's batches, before the step; NaN for a task without a target
    weights: Mapping[str, Tensor]  # that the method gave; none for a task whose gradient is zero in the step
    lr: float  # the first parameter group's learning rate


class Recorder:
    """Writes a line for every step, and one for every epoch, to a JSON Lines file.

    A step's line has the fields `epoch`, `step`, `lr`, `losses` and `weights`; an epoch's those of `recon.Epoch`.
    Numbers are read from the device many steps at a time. With `recon.train(checkpoint=...)`, an interruption leaves
    no line out and none twice. Of several processes, the first one writes.

    Args:
        path: the file; an older one is replaced.
        also: called with each line's object as it is written.
        seconds: the longest that a step waits for being written.
    """

    def __init__(
        self, path: str | Path, also: Sequence[Callable[[dict[str, Any]], None]] = (), seconds: float = 10.0
    ) -> None:
        self.path = Path(path)
        self.also = also
        self.seconds = seconds
        self._waiting: list[Step | Epoch] = []
        self._size = 0
        self._written_at = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def step(self, step: Step) -> None:
        """Note a step."""
        if rank():
            return
        self._waiting.append(step)
        if len(self._waiting) >= _MOST_STEPS or time.monotonic() - self._written_at >= self.seconds:
            self.flush()

    def epoch(self, record: Epoch) -> None:
        """Note the end of an epoch, and write what was noted."""
        if rank() == 0:
            self._waiting.append(record)
            self.flush()

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            UsageError: the file cannot be written.
        """
        lines = _lines(self._waiting)
        self._waiting.clear()
        self._written_at = time.monotonic()
        if not lines:
            return
        text = "".join(json.dumps(json_values(line), allow_nan=False) + "\n" for line in lines)
        self._size = write_from(self.path, self._size, text)
        for tell in self.also:
            for line in lines:
                tell(line)

    def state_dict(self) -> dict[str, Any]:
        """Where the file ends; it is written up to there."""
        self.flush()
        return {"size": self._size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the line that was the last one when `state_dict` was called."""
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < state["size"] and rank() == 0:
            logger.warning("%s is shorter than when the checkpoint was saved: its last steps are missing.", self.path)
        self._size = min(found, state["size"])


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a recorder's file."""
    documents = read_documents(path, CheckpointError, "It should hold the steps of a training, one a line.")
    return [_checked(document) for document in documents]


def _checked(line: Document) -> dict[str, Any]:
    """A step or an epoch, with numbers where numbers belong; null is one that is not finite."""
    if "step" in line:
        line.integer("step")
        for table in (line.table("losses"), line.table("weights")):
            for task in table:
                table.number_or_nan(task)
    return dict(line.values)


def mean_weights(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """`{task: mean weight}` over the steps in which the task had one; empty if the method has no weights."""
    by_task = {task: [r["weights"][task] for r in records if "step" in r and task in r["weights"]] for task in tasks}
    found = {task: [w for w in weights if w is not None] for task, weights in by_task.items()}
    return {task: sum(weights) / len(weights) for task, weights in found.items() if weights}


def _lines(noted: Sequence[Step | Epoch]) -> list[dict[str, Any]]:
    steps = [entry for entry in noted if isinstance(entry, Step)]
    numbers = iter(_floats([v for step in steps for table in (step.losses, step.weights) for v in table.values()]))
    return [_step_line(entry, numbers) if isinstance(entry, Step) else asdict(entry) for entry in noted]


def _step_line(step: Step, numbers: Any) -> dict[str, Any]:
    losses = {task: next(numbers) for task in step.losses}
    weights = {task: next(numbers) for task in step.weights}
    losses = {task: loss for task, loss in losses.items() if loss == loss}
    return {"epoch": step.epoch, "step": step.number, "lr": step.lr, "losses": losses, "weights": weights}


def _floats(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers, read from each device at one go."""
    values = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        places = [place for place, scalar in enumerate(scalars) if scalar.device == device]
        read = torch.stack([scalars[place].detach().reshape(()).to(torch.float64) for place in places]).tolist()
        for place, value in zip(places, read, strict=True):
            values[place] = value
    return values
