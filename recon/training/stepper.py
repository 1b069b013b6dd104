"""Stepper: one optimizer step, from its batches to the new weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import GradientError, NonFiniteError, ProblemError
from recon.methods.bases.method import WHAT_TO_LOOK_AT
from recon.methods.gradients.reach import average_losses
from recon.methods.gradients.sparse import entries
from recon.problems.problem import Loss
from recon.support.network.forward import Batch, to_device, unpack
from recon.support.network.layers import unwrapped
from recon.support.network.state import state_kept
from recon.support.processes import average_, gather, world_size
from recon.support.random_states import global_states_kept
from recon.training.optimizers import take_step
from recon.training.precision import Precision
from recon.training.recorder import Recorder, Step
from recon.training.run import TrainingRun

logger = logging.getLogger(__name__)

Scalars = Mapping[str, Tensor]

_PLAIN = Precision(None, torch.device("cpu"))


@dataclass(frozen=True)
class Stepper:
    """Takes the steps of a training; `clip` is the largest norm of an update, the recorder is told of every step."""

    run: TrainingRun
    losses: Mapping[str, Loss]
    clip: float | None = None
    recorder: Recorder | None = None

    def take(self, batches: Iterable[Batch]) -> None:
        """One optimizer step, with the mean of the updates of a few batches; none if no batch has a target."""
        run = self.run
        run.optimizer.zero_grad()
        done: list[_Part] = []
        for batch in batches:
            done += self._differentiate(batch)
            run.end_batch()
        if not done:
            return
        if len(done) > 1:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(len(done))
        if not run.precision.gradients_finite(run.method):
            run.meter.check_pending()  # a loss that is not finite is no overflow on the way back
            run.meter.skipped += 1
            return
        self._refuse_non_finite(done)
        if self.clip is not None:
            own = set(run.method.parameters())
            nn.utils.clip_grad_norm_([p for p in self._parameters() if p not in own], self.clip)
        lr = float(run.optimizer.param_groups[0]["lr"])
        take_step(run.optimizer, run.model)
        if run.scheduler is not None:
            run.scheduler.step()
        run.meter.steps += 1
        if run.method.needs_new_losses:
            run.method.after_step(self._losses_now(done[-1].batch))
        if self.recorder is not None:
            losses, weights = _mean([part.losses for part in done]), _mean([part.weights for part in done])
            if world_size() > 1:
                losses = average_losses(losses, tuple(self.losses), run.device)
            self.recorder.step(Step(run.epoch, run.steps, losses, weights, lr))

    def _differentiate(self, batch: Batch) -> list[_Part]:
        """Accumulate a batch's update into `.grad`; none for a batch without targets."""
        run = self.run
        batch = to_device(unpack(batch), run.device)
        if run.position[:2] == (1, 0):
            _warn_of_other_names(batch[1], self.losses)
        losses = task_losses(run.model, *batch, self.losses, run.precision)
        if not losses and world_size() == 1:  # other ranks may have some
            return []
        run.meter.check(losses)
        try:
            weights = run.precision.backward(losses, run.model, run.method, run.profiler)
        except NonFiniteError:
            run.meter.check_pending()  # a loss that is NaN says more than its gradient
            raise
        run.meter.add(losses, weights)
        return [_Part(batch, _detached(losses), _detached(weights))]

    def _refuse_non_finite(self, done: Sequence[_Part]) -> None:
        """Refuse an update or a loss that is not finite: on a GPU, the one time in a step that it is waited for.

        The message names the task, which a second look at the batches shows.
        """
        meter, device = self.run.meter, self.run.device
        gradients = [g for p in self._parameters() if p.grad is not None and (g := entries(p.grad)).numel()]
        finite = [nn.utils.get_total_norm(gradients, math.inf).isfinite()] if gradients else []
        finite += [loss.isfinite() for losses in meter.unchecked for loss in losses.values()]
        share = (
            torch.stack([flag.to(device) for flag in finite]).float().mean()
            if finite
            else torch.ones((), device=device)
        )
        average_([share])  # a rank that alone raised would leave the others waiting
        if share < 1:
            meter.check_pending()
            raise self._culprit(done)
        meter.unchecked.clear()

    def _culprit(self, done: Sequence[_Part]) -> GradientError:
        run = self.run
        model, bad = unwrapped(run.model), set()
        for part in done:
            with state_kept(model), global_states_kept():
                bad |= non_finite_tasks(task_losses(model, *part.batch, self.losses, run.precision), model)
        everyone = set().union(*gather(bad))
        tasks = [task for task in self.losses if task in everyone]
        where = f"in step {run.meter.steps + 1} of epoch {run.epoch}"
        if not tasks:
            return NonFiniteError(
                f"The update is not finite {where}, though each task's gradient is: their sum, or what method "
                f"{run.method.name!r} makes of them, overflows. Lower the learning rate, or look at the tasks' losses."
            )
        return NonFiniteError(
            f"The gradient of task {', '.join(map(repr, tasks))} is not finite {where}, though the loss is; no weight "
            f"was changed by it. {WHAT_TO_LOOK_AT}"
        )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.run.optimizer.param_groups for p in group["params"]]

    def _losses_now(self, batch: Batch) -> Scalars:
        """The losses of a batch that is done, computed again without changing any state."""
        run = self.run
        with state_kept(run.model), global_states_kept(), torch.no_grad():
            losses = task_losses(run.model, *batch, self.losses, run.precision)
        anywhere = {task for tasks in gather(list(losses)) for task in tasks}
        return average_losses(losses, [task for task in self.losses if task in anywhere], run.device)


@dataclass(frozen=True)
class _Part:
    """A batch of a step: itself, its losses, and the weights that the method gave them."""

    batch: Batch
    losses: Scalars
    weights: Scalars


def task_losses(
    model: nn.Module,
    inputs: Any,
    targets: Mapping[str, Any],
    losses: Mapping[str, Loss],
    precision: Precision | None = None,
) -> dict[str, Tensor]:
    """`{task name: scalar loss}` of one batch, for the tasks of `losses` that have a target in it.

    The precision is that of the forward: the model's own when not given.
    """
    present = [task for task in losses if targets.get(task) is not None]
    if not present:
        return {}
    outputs = (precision or _PLAIN).outputs(model, inputs, present)
    step_losses = {task: losses[task](outputs[task], targets[task]) for task in present}
    for task, loss in step_losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ProblemError(
                f"The loss of task {task!r} must be a scalar tensor, but is {got}. Reduce it, e.g. mean()."
            )
    return step_losses


def non_finite_tasks(losses: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """The tasks whose gradient is not finite somewhere; the losses' graph is freed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    bad = set()
    for number, (task, loss) in enumerate(losses.items(), start=1):
        found = torch.autograd.grad(loss, parameters, retain_graph=number < len(losses), allow_unused=True)
        if any(not entries(g).isfinite().all() for g in found if g is not None):
            bad.add(task)
    return bad


def _warn_of_other_names(targets: Mapping[str, Any], tasks: Iterable[str]) -> None:
    """A misspelt name looks like a missing target, which is no error before the epoch's end."""
    missing = [task for task in tasks if targets.get(task) is None]
    others = [name for name in targets if name not in tasks]
    if missing and others:
        logger.warning(
            "The first batch has no target for %s, but it has targets for %s, which are not tasks. If these are the "
            "same under another name, use one name for both.",
            missing,
            others,
        )


def _detached(scalars: Scalars) -> dict[str, Tensor]:
    return {task: value.detach() for task, value in scalars.items()}


def _mean(tables: Sequence[Scalars]) -> Scalars:
    """The mean of each task over the tables that have it."""
    if len(tables) == 1:
        return tables[0]
    tasks = dict.fromkeys(task for table in tables for task in table)
    return {task: torch.stack([table[task] for table in tables if task in table]).mean() for task in tasks}
