"""profile(): the warm-up training that fills a conflict map."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recon.errors import GradientError, UsageError
from recon.maps import ConflictMap
from recon.methods import Method
from recon.methods.gradients.observer import Memory
from recon.methods.updates.one_task_steps import FIRST
from recon.problems.losses import Losses, TaskLosses, as_losses
from recon.profiling.floor import FloorEvery
from recon.profiling.profiler import Profiler
from recon.support.network.forward import Batch
from recon.support.network.layer_choice import Patterns
from recon.training import Epoch, History, train
from recon.training.batches.accumulation import Accumulate
from recon.training.batches.batch_stream import batch_count
from recon.training.batches.meetings import NobodyMeetsError
from recon.training.optimizers import SchedulerOrMaker, as_one, name_of
from recon.training.precision import Amp

logger = logging.getLogger(__name__)

_MEMORIES = {"exact": "all tasks' held at once (exact)", "sketch": "folded into sketches as they come (sketch)"}


def profile(
    model: nn.Module,
    loader: Iterable[Batch],
    losses: Losses | TaskLosses,
    *,
    tasks: Sequence[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer],
    epochs: int = 3,
    threshold: float = -0.1,
    method: str | Method = "joint",
    scheduler: SchedulerOrMaker | Sequence[SchedulerOrMaker | None] | None = None,
    clip: float | None = None,
    accumulate: Accumulate = 1,
    amp: Amp | None = None,
    every: int = 1,
    until_stable: float | None = None,
    top_k: int | None = None,
    memory: Memory = "exact",
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    units: Patterns | None = None,
    floor: FloorEvery = "auto",
    made_by: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    settings: Mapping[str, Any] | None = None,
    on_checkpoint: Callable[[ConflictMap], None] | None = None,
) -> ConflictMap:
    """Warm-up training that scores every shared layer (Shi et al. 2023, algorithm 1, lines 1-9).

    The scored gradients train the model too: it ends as the same training without profiling would leave it, to
    rounding.

    Args:
        model: `model(inputs) -> {task name: output}`; it is trained in place.
        loader: yields `(inputs, {task name: target})`, or `{task name: (inputs, target)}` where each task has inputs of
            its own (`recon.joint_loader`); see `recon.train`.
        losses: `{task name: (output, target) -> scalar}`, or one function of the whole batch; see `recon.train`.
        tasks: the names of the tasks, for losses that are one function.
        optimizer: of the model's parameters; or several, see `recon.train`.
        epochs: passes over the loader.
        threshold: S in (-1, 0], a multiple of 0.01.
        method: the gradient method of the warm-up.
        scheduler: of the learning rate, see `recon.train`.
        clip: the largest norm of an update, see `recon.train`.
        accumulate: batches for one optimizer step, see `recon.train`. The conflicts of each batch count; with `"tasks"`
            those of the gathered batches, together.
        amp: precision of the forward, see `recon.train`.
        every: profile each n-th step only, see `Profiler`.
        until_stable: stop when the top layers are expected to overlap by this share with those of all the epochs.
        top_k: of how many layers; a quarter of the shared ones when not given.
        memory: `exact`, or `sketch` for large models and many tasks, see `Profiler`.
        layers: the layers to count in, by regular expressions; the others train as ever. See `Profiler`.
        exclude: the layers to leave out, in the same way.
        units: joins layers into one, in the same way: an adapter's matrices, the layers of a block.
        floor: take the noise floor in the first and then each n-th profiled step, n from 2 on: the gradients of the
            next batch, at the same weights, are compared with the step's, each task with itself too. That step takes
            about twice as long; `auto` is each 12th, which makes a profile up to 15 % dearer. None leaves it out. The
            training is the same with it: the batch is looked at ahead of time and trained on in its turn.
        made_by: what else to note in the map's file about how it was made.
        on_epoch: called with the epoch's record after each epoch.
        progress: show a progress bar on stderr.
        checkpoint: a file that keeps the training and the counts; see `recon.train` for it, `resume`,
            `checkpoint_seconds` and `settings`.
        resume: go on from the checkpoint, to the map that the training would have given without the interruption.
        checkpoint_seconds: how often to save within an epoch.
        settings: what else must be the same at the resume.
        on_checkpoint: called after every checkpoint with the map so far, once there is something in it; its `made_by`
            says that it is not finished, and which epoch it comes from.

    Raises:
        ProblemError: model, losses and batches do not fit together.
        LoaderError: the loader raised.
        GradientError: a loss is not finite, or a task has no gradient anywhere.
        UsageError: the threshold is off the grid, the layers cannot be chosen so, none is shared, a checkpoint cannot
            be written, or one is there although `resume` is not asked for. If no two tasks meet in the first 20 steps,
            or in a shorter epoch, or no layer is shared in the first 20 profiled ones, it is raised there and then.
        UnknownNameError: an expression matches no layer.
        CheckpointError: the checkpoint is damaged, or of another training.
    """
    losses = as_losses(losses, tasks)
    profiler = Profiler(
        model,
        threshold,
        losses.tasks,
        every=every,
        until_stable=until_stable,
        top_k=top_k,
        memory=memory,
        layers=layers,
        exclude=exclude,
        units=units,
        floor=floor,
    )
    logger.info("Task gradients: one backward pass a task, %s.", _MEMORIES[memory])
    count = batch_count(loader)
    planned = None if count is None or accumulate == "tasks" else -(-epochs * count // every)
    together = as_one(optimizer)
    group = together.param_groups[0]
    learning_rate = group.get("initial_lr", group.get("lr"))  # where the schedule begins, if there is one

    def map_of(history: History, **more: Any) -> ConflictMap:
        how = {
            "method": method if isinstance(method, str) else method.name,
            "optimizer": name_of(together),
            "learning_rate": learning_rate,
            "epochs": epochs,
            **({} if clip is None else {"clip": clip}),
            **({} if accumulate == 1 else {"accumulate": accumulate}),
            **({} if amp is None else {"amp": amp}),
            **({} if every == 1 else {"every": every}),
            **({} if memory == "exact" else {"memory": memory}),
            **({} if profiler.floor_every is None else {"floor_every": profiler.floor_every}),
            **({} if until_stable is None else {"until_stable": until_stable}),
            "seconds": round(history.seconds, 2),
            "torch": torch.__version__,
        }
        return profiler.conflict_map({**how, **(made_by or {}), **more})

    def show_map(history: History) -> None:
        if on_checkpoint is None:
            return
        try:
            cmap = map_of(history, finished=False, epoch=history.epochs[-1].number)
        except (UsageError, GradientError):  # no step was profiled yet, or none that counts
            return
        on_checkpoint(cmap)

    def forget() -> None:
        """Leave no checkpoint that would end here again."""
        if checkpoint is not None:
            Path(checkpoint).unlink(missing_ok=True)

    def ends() -> bool:
        if profiler.steps >= FIRST and not profiler.found_shared:
            forget()
            profiler.conflict_map()  # says what is missing
        return until_stable is not None and profiler.is_stable(planned)

    try:
        history = train(
            model,
            loader,
            losses,
            method=method,
            optimizer=optimizer,
            epochs=epochs,
            scheduler=scheduler,
            clip=clip,
            accumulate=accumulate,
            amp=amp,
            profiler=profiler,
            on_epoch=on_epoch,
            stop=ends,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            settings={
                "threshold": threshold,
                "every": every,
                "until_stable": until_stable,
                "top_k": top_k,
                "memory": memory,
                **profiler.choice,
                **({} if profiler.floor_every is None else {"floor": profiler.floor_every}),
                **(settings or {}),
            },
            on_checkpoint=show_map,
        )
    except NobodyMeetsError:
        forget()
        raise
    try:
        return map_of(history)
    except (UsageError, GradientError):
        forget()
        raise
