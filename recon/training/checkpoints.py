"""Checkpoints: when a training is saved, what a checkpoint belongs to, and how the training resumes from it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recon.errors import CheckpointError, ReconError, UsageError, reason_of
from recon.methods import Method
from recon.support.files.whole import remove_partial, written_alone
from recon.support.processes import world_size
from recon.training.batches.batch_stream import batch_count
from recon.training.checkpoint_file import check_same, read_training, write_training
from recon.training.history import History
from recon.training.optimizers import Together, name_of, parts_of
from recon.training.run import TrainingRun

logger = logging.getLogger(__name__)


class Checkpoints:
    """Keeps a training's state in a file, so that it can go on as if it had never been interrupted.

    Every epoch's end is saved, and within an epoch the step after each `seconds`; without a path, nothing is kept.
    `settings` is what else a checkpoint belongs to, plain values by name; `on_save` is called with the history so far.
    """

    def __init__(
        self,
        run: TrainingRun,
        path: str | Path | None,
        *,
        seconds: float,
        settings: Mapping[str, Any],
        on_save: Callable[[History], None] | None,
    ) -> None:
        if not seconds >= 0:
            raise UsageError(f"checkpoint_seconds is {seconds}. Give a number of at least 0.")
        if path is not None and world_size() > 1:
            raise UsageError("A checkpoint keeps the training of one process, but several train together here.")
        self.run = run
        self.path = None if path is None else Path(path)
        self.seconds = seconds
        self.on_save = on_save
        # Before anything is loaded: what a schedule has made of the learning rate is no setting.
        self._belongs_to = belongs_to(run, settings)
        self._interrupts = Interrupts()
        self._whole = True
        self._saved = run.position
        self._saved_at = time.monotonic()

    def open(self, resume: bool, epochs: int) -> None:
        """Take up the training where the checkpoint left it; without `resume`, refuse one that is there."""
        if self.path is None:
            if resume:
                raise UsageError("resume=True needs the path of a checkpoint: checkpoint='run.checkpoint'.")
            return
        if not resume:
            refuse_existing(self.path)
        remove_partial(self.path)
        if not self.path.exists():
            if resume:
                logger.info("There is no checkpoint %s: starting from the beginning.", self.path)
            return
        self._load(read_training(self.path))
        begun = self.run.epoch - (self.run.stream.drawn == 0)
        if begun > epochs:
            raise CheckpointError(
                f"{self.path} is already in epoch {begun}, but epochs is {epochs}. Ask for {begun} or more, or delete "
                "the file to start over."
            )
        self._saved = self.run.position
        logger.info("Resuming from %s: %s.", self.path, progress(self.run))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, save the last complete step if that is possible, whatever ends the training."""
        if self.path is None:
            yield
            return
        with written_alone(self.path), self._interrupts.installed():
            try:
                yield
            except BaseException:
                self._save_after_failure()
                raise

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, or whatever else must be done as a whole: Ctrl-C waits, and a failure leaves nothing to save."""
        with self._interrupts.held():
            self._whole = False
            yield
            self._whole = True

    def save_if_due(self) -> None:
        """Save if the last time is long enough ago."""
        if self.path is not None and time.monotonic() - self._saved_at >= self.seconds:
            self.save()

    def save(self) -> None:
        """Save where the training is; a loss that was not finite is raised in place of it."""
        if self.path is None or self.run.position == self._saved:
            return
        self.run.meter.check_pending()
        if not all(parameter.isfinite().all() for parameter in self.run.model.parameters()):
            return  # the next step will find out; the last good checkpoint stays
        with self._interrupts.held(), self.run.meter.paused():
            # If it cannot be written now, do not try again on the way out.
            self._saved = self.run.position
            write_training(self.path, {"belongs_to": self._belongs_to, **self.run.state_dict()})
            if self.on_save is not None:
                self.on_save(self.run.history_so_far())
            self._saved_at = time.monotonic()

    def _save_after_failure(self) -> None:
        if self._whole and self.run.stream.settled:
            try:
                self.save()
            except ReconError as error:  # what ended the training is the error to show
                logger.warning("The last steps could not be saved. %s", error)

    def _load(self, saved: Mapping[str, Any]) -> None:
        assert self.path is not None
        try:
            check_same(self.path, saved["belongs_to"], self._belongs_to)
            self.run.load_state_dict(saved)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"{self.path} does not fit this training ({type(error).__name__}: {reason_of(error)}). Resume with the "
                "code that wrote it, or delete it to start over."
            ) from error


class Interrupts:
    """While installed, Ctrl-C raises its KeyboardInterrupt only where no step is under way.

    In the middle of a step some of the weights or statistics are new and some are old: there is nothing to save.
    A second Ctrl-C does not wait. A handler that the user installed stays in place, and Python lets
    only the main thread handle signals at all.
    """

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signal; Python's own handler comes back in the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let Ctrl-C wait."""
        self._held, self._pending = True, False
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held or self._pending:
            raise KeyboardInterrupt
        self._pending = True


def checkpoint_beside(out: Path) -> Path:
    """Where the checkpoint of a training is kept whose result goes to the file `out`."""
    return out.with_name(f"{out.name}.checkpoint")


def refuse_existing(path: Path) -> None:
    """A checkpoint that an interrupted training left is not overwritten by another one."""
    if path.exists():
        raise UsageError(
            f"{path} exists already: an interrupted training left it, and can go on from it with --resume (in Python, "
            "resume=True). To start over, delete the file."
        )


def progress(run: TrainingRun) -> str:
    """How far a training got, for messages."""
    if run.stream.drawn:
        return f"in epoch {run.epoch}, after {run.stream.drawn} of its batches"
    return f"after epoch {run.epoch - 1}"


def belongs_to(run: TrainingRun, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed training must share, by the names that error messages use."""
    return {
        **settings,
        "tasks": list(run.method.tasks),
        **_method_fields(run.method),
        **_optimizer_fields(run.optimizer),
        **_scheduler_fields(run.scheduler),
        "number of batches": batch_count(run.stream.loader),
        **_model_fields(run.model),
    }


def _method_fields(method: Method) -> dict[str, Any]:
    name = method.name or type(method).__name__
    return {"method": name, **{f"{name}:{option}": value for option, value in method.settings().items()}}


def _optimizer_fields(optimizer: Optimizer | Together) -> dict[str, Any]:
    fields: dict[str, Any] = {"optimizer": name_of(optimizer)}
    groups = optimizer.param_groups
    for number, group in enumerate(groups):
        where = f"optimizer.param_groups[{number}]." if len(groups) > 1 else "optimizer."
        for name, value in group.items():
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if name != "params" and _is_plain(value):
                fields[where + name] = value
    return fields


def _scheduler_fields(scheduler: LRScheduler | Together | None) -> dict[str, Any]:
    if scheduler is None:
        return {"scheduler": None}
    fields: dict[str, Any] = {"scheduler": name_of(scheduler)}
    parts = parts_of(scheduler)
    for number, part in enumerate(parts):
        where = f"scheduler[{number}]." if len(parts) > 1 else "scheduler."
        fields |= {where + name: value for name, value in part.state_dict().items() if _is_plain(value)}
    return fields


def _model_fields(model: nn.Module) -> dict[str, Any]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {
        f"the model's {name}": f"{tuple(value.shape)} of {value.dtype}{', frozen' if name in frozen else ''}"
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, Counter)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
