"""train(): any method, on any model, plain or branched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from recon.errors import UsageError
from recon.methods import Method, parse, wrap
from recon.methods.gradients.observer import StepObserver
from recon.problems.losses import Losses, TaskLosses, as_losses
from recon.support.network.forward import Batch, model_device
from recon.support.network.trainable import refuse_untrainable
from recon.support.processes import broadcast_model
from recon.training.batches.accumulation import Accumulate, Update, check_accumulate, updates_in_step, updates_of
from recon.training.batches.batch_stream import BatchStream, batch_count
from recon.training.checkpoints import Checkpoints
from recon.training.history import Epoch, History
from recon.training.optimizers import SchedulerOrMaker, add_parameters, as_one, check_parameters, schedulers_of
from recon.training.precision import Amp, Precision
from recon.training.recorder import Recorder
from recon.training.run import TrainingRun
from recon.training.second_batch import LookAhead, take_floor
from recon.training.stepper import Stepper

_BAR_SECONDS = 2.0  # between two looks at the losses: each waits for the device


def train(
    model: nn.Module,
    loader: Iterable[Batch],
    losses: Losses | TaskLosses,
    *,
    tasks: Sequence[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer],
    method: str | Method = "joint",
    epochs: int = 1,
    scheduler: SchedulerOrMaker | Sequence[SchedulerOrMaker | None] | None = None,
    clip: float | None = None,
    accumulate: Accumulate = 1,
    amp: Amp | None = None,
    profiler: StepObserver | None = None,
    recorder: Recorder | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    settings: Mapping[str, Any] | None = None,
    on_checkpoint: Callable[[History], None] | None = None,
) -> History:
    """Train `model` in place.

    Several processes of one group train it together, each with a loader for its own part of the data: gradients are
    averaged over the ranks, as DistributedDataParallel does; the model need not be wrapped in it.

    Args:
        model: `model(inputs) -> {task name: output}`, plain or branched.
        loader: yields `(inputs, {task name: target})`, or `{task name: (inputs, target)}` where each task has inputs of
            its own (`recon.joint_loader`); both kinds may come from one loader. In the second kind each task runs its
            own forward and backward, its graph freed before the next; together they are one step. A task whose target
            is missing or None is skipped in that step.
        losses: `{task name: (output, target) -> scalar}`; a single entry trains a single-task baseline. Or one function
            of the whole batch, `(outputs, batch) -> {task name: scalar}`, with the model's outputs and the batch as
            `(inputs, targets)`; of a batch `{task name: (inputs, target)}` it gets one task's part after the other, as
            `(inputs, {task name: target})`. A loss that is None says that the task is absent in this batch.
        tasks: the names of the tasks, for losses that are one function.
        optimizer: of the model's parameters; its step takes the gradients as they are, without a closure. Or several,
            each of some of the parameters, `[SparseAdam(tables), Adam(others)]`. A method that learns (uw) gets a group
            of its own, in the first that takes gradients which are not sparse.
        method: a name (`recon.methods.names()`), a name with options (`"cagrad:c=0.5"`), or a method, also
            one of TorchJD's (see `recon.methods.wrap`).
        epochs: passes over the loader.
        scheduler: stepped after every optimizer step; or what makes one of the optimizer, which a method that learns
            needs: a scheduler must know all parameter groups from the start. For several optimizers, a function that
            makes one of each, or a list with one for each (None for an optimizer without).
        clip: scale an update that is longer down to this norm, after the method has made it.
        accumulate: batches for one optimizer step. The method makes an update of each batch, and the step is taken with
            their mean; the last step of an epoch may have fewer. A batch without any target does not count. Or
            `"tasks"`: batches are gathered until each task has been seen, and make one joint step, whose gradients the
            method sees together. A task with a target in several of them counts with the mean over these. The last
            step of an epoch has what is left, and may lack tasks.
        amp: compute the forward in `bf16`, or on a GPU `fp16`, by autocast. Losses see float32 outputs; gradients and
            updates are float32. In `fp16` the losses are scaled for the way back, and a step whose gradients overflow
            is skipped.
        profiler: records conflicts from the gradients of this training. If no two tasks meet in its first 20 steps, or
            in a shorter first epoch, there is nothing to record, and the training ends.
        recorder: writes the losses, weights and learning rate of every step to a file.
        on_epoch: called with each epoch's record, for evaluation, say. What it puts into `epoch.results` is kept in the
            history, in checkpoints and by the recorder.
        stop: asked after each step; the training ends when it says True, and the epoch's record holds what was done.
        progress: show a progress bar on stderr.
        checkpoint: a file that keeps the training's state: written at each epoch's end, in between, and when Ctrl-C
            or an error ends the training. It is left there in the end.
        resume: go on from the checkpoint, if there is one. Called as before, with the same loader, the training goes
            on as if it had never stopped; on the CPU, to the last bit. `epochs` may be more than before. Model,
            optimizer, scheduler, method, profiler, random states and the generators in the loader are put back. The
            batches of the epoch that are done already are drawn again. A loader of your own that depends on anything
            else, a count of its epochs say, needs `state_dict()` and `load_state_dict(state)`; the persistent workers
            of a DataLoader have random states that no one can put back.
        checkpoint_seconds: how often to save in between; 0 saves after every step.
        settings: what else must be the same at the resume: plain values by name.
        on_checkpoint: called with the history so far, the epoch under way included, when a checkpoint was written.

    Raises:
        ProblemError: model, losses and batches do not fit together.
        LoaderError: the loader raised.
        GradientError: a loss is not finite, or a task has no gradient anywhere.
        UsageError: no such method, losses of the whole batch without `tasks`, `epochs` or `accumulate` below 1, a
            `clip` that is not above 0, `fp16` on a CPU, a model that is sharded over processes, the optimizer of
            another model or one whose step needs a closure (LBFGS), a parameter in two optimizers, an optimizer that
            does not take sparse gradients, or no others (SparseAdam), a profiler where no two tasks meet, a checkpoint
            that cannot be written, or one that is there although `resume` is not asked for.
        CheckpointError: the checkpoint is damaged, or of another training.
    """
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}. Train for at least 1.")
    check_accumulate(accumulate)
    if clip is not None and not (isinstance(clip, (int, float)) and 0 < clip < math.inf):
        raise UsageError(f"clip is {clip!r}; give a norm above 0, or None to leave updates as they are.")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}, which cannot be run. Pass a torch.nn.Module.")
    refuse_untrainable(model)
    losses = as_losses(losses, tasks)
    optimizers = as_one(optimizer)
    if recorder is not None and not isinstance(recorder, Recorder):
        raise UsageError(f"recorder is {recorder!r}. Pass recon.Recorder('metrics.jsonl'), with the path of your file.")
    check_parameters(optimizers, model)
    method = parse(method) if isinstance(method, str) else wrap(method)
    device = model_device(model)
    precision = Precision(amp, device)
    method.setup(losses.tasks)
    method.to(device)
    method.attach(model)
    add_parameters(method, optimizers, scheduler)
    schedulers = schedulers_of(optimizers, scheduler)
    broadcast_model(model)
    stream = BatchStream(loader, remembers=checkpoint is not None)
    run = TrainingRun(model, optimizers, schedulers, method, profiler, stream, device, precision, recorder)
    settings = {"clip": clip, "accumulate": accumulate, "amp": amp, **(settings or {})}
    checkpoints = Checkpoints(run, checkpoint, seconds=checkpoint_seconds, settings=settings, on_save=on_checkpoint)
    stepper = Stepper(run, losses, clip, recorder)

    def take(updates: Iterable[Update]) -> None:
        stepper.take(updates)
        if profiler is not None:
            run.meetings.refuse_none(len(losses.tasks))
        run.stopped = stop is not None and stop()

    checkpoints.open(resume, epochs)
    with checkpoints.kept(), recorder or nullcontext():
        while True:
            if not run.reported:
                if on_epoch is not None:
                    on_epoch(run.history.epochs[-1])
                if recorder is not None:
                    recorder.epoch(run.history.epochs[-1])
                run.end_report()
                checkpoints.save()
            if run.ends_at(epochs):
                return run.history
            model.train()
            updates = LookAhead(updates_of(_with_bar(run, epochs, progress), accumulate, losses))
            for update in updates:
                with checkpoints.step():
                    take_floor(run, losses, update, updates)
                    take(chain([update], islice(updates, updates_in_step(accumulate) - 1)))
                    if updates.ahead and not run.stopped:  # the loader is past it: nothing is saved before it is done
                        take(islice(updates, 1))
                if run.stopped:
                    break
                checkpoints.save_if_due()
            with checkpoints.step():
                if profiler is not None and not run.stopped:
                    run.meetings.refuse_none(len(losses.tasks), epoch_ends=True)
                method.end_epoch()
                run.end_epoch(run.meter.epoch() if run.stopped else run.meter.whole_epoch(losses, loader))


def _with_bar(run: TrainingRun, epochs: int, show: bool) -> Iterator[Batch]:
    """The batches of the epoch that are not done yet, with a bar on stderr that shows the losses every so often."""
    if not show:
        yield from run.batches()
        return
    title, total = f"epoch {run.epoch}/{epochs}", batch_count(run.stream.loader)
    bar = tqdm(run.batches(), title, total, initial=run.stream.drawn, leave=False, unit="batch")
    looked = time.monotonic()
    for batch in bar:
        yield batch
        if time.monotonic() - looked >= _BAR_SECONDS:
            looked = time.monotonic()
            bar.set_postfix({task: f"{loss:.4f}" for task, loss in run.meter.mean_losses().items()})
