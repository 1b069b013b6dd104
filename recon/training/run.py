"""TrainingRun: everything that the steps of a training change, and how far they got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recon.methods import Method
from recon.methods.gradients.observer import StepObserver
from recon.support.files.weights import load_weights
from recon.support.network.forward import Batch
from recon.training.batches.batch_stream import BatchStream
from recon.training.batches.meetings import Meetings
from recon.training.history import Epoch, EpochMeter, History
from recon.training.optimizers import Together
from recon.training.precision import Precision
from recon.training.recorder import Recorder


@dataclass
class TrainingRun:
    """A training, between two of its steps.

    The method is set up for the tasks, and the optimizer has the parameters of the model and of the method.

    Attributes:
        history: of the finished epochs.
        meter: of the epoch under way.
        meetings: which tasks have met in the first steps.
        reported: whether `on_epoch` and the recorder have had the last finished epoch.
        stopped: whether `stop` has ended the training.
    """

    model: nn.Module
    optimizer: Optimizer | Together
    scheduler: LRScheduler | Together | None
    method: Method
    profiler: StepObserver | None
    stream: BatchStream
    device: torch.device
    precision: Precision
    recorder: Recorder | None

    def __post_init__(self) -> None:
        self.history = History()
        self.meter = EpochMeter(1, self.device)
        self.meetings = Meetings()
        self.reported = True
        self.stopped = False

    @property
    def epoch(self) -> int:
        """The number of the epoch under way, from 1."""
        return self.meter.number

    @property
    def steps(self) -> int:
        """All optimizer steps taken."""
        return self.history.steps + self.meter.steps

    @property
    def position(self) -> tuple[int, int, bool]:
        """How far the training got."""
        return self.epoch, self.stream.drawn, self.reported

    def ends_at(self, epochs: int) -> bool:
        """Whether nothing is left to do."""
        return self.epoch > epochs or (self.stopped and self.stream.drawn == 0)

    def batches(self) -> Iterator[Batch]:
        """The batches of the epoch that are not done yet; see `BatchStream.rest`."""
        if self.stopped:
            return
        if self.stream.drawn == 0:
            self.meter.start()
        batches = self.stream.rest(self.epoch)
        self.meter.start()
        yield from batches

    def end_batches(self, number: int) -> None:
        """Note that the next so many batches are done."""
        for _ in range(number):
            self.stream.end_step()

    def end_epoch(self, record: Epoch) -> None:
        """Note that an epoch is done, and not reported yet."""
        self.history.epochs.append(record)
        self.meter = EpochMeter(record.number + 1, self.device)
        self.reported = False
        self.stream.begin_epoch()

    def end_report(self) -> None:
        """Note that the last epoch was reported."""
        self.reported = True
        self.stream.begin_epoch()

    def history_so_far(self) -> History:
        """The history, with the epoch under way as its last."""
        return History(self.history.epochs + ([self.meter.epoch()] if self.meter.steps else []))

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "profiler": None if self.profiler is None else self.profiler.state_dict(),
            "history": [asdict(epoch) for epoch in self.history.epochs],
            "meter": self.meter.state_dict(),
            "meetings": self.meetings.state_dict(),
            "reported": self.reported,
            "stopped": self.stopped,
            "stream": self.stream.state_dict(),
            "precision": self.precision.state_dict(),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.method.load_state_dict(state["method"])
        if self.profiler is not None:
            self.profiler.load_state_dict(state["profiler"])
        self.history = History([Epoch(**epoch) for epoch in state["history"]])
        self.meter.load_state_dict(state["meter"])
        if "meetings" in state:  # a training from before counts them from here
            self.meetings.load_state_dict(state["meetings"])
        self.reported, self.stopped = state["reported"], state["stopped"]
        self.stream.load_state_dict(state["stream"])
        self.precision.load_state_dict(state["precision"])
        if self.recorder is not None and state["recorder"] is not None:
            self.recorder.load_state_dict(state["recorder"])
