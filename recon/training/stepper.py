"""Stepper: one optimizer step, from its batches to the new weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.errors import GradientError, NonFiniteError
from recon.methods.bases.method import WHAT_TO_LOOK_AT
from recon.methods.gradients.reach import average_losses
from recon.methods.gradients.sparse import entries
from recon.problems.losses import LossOfEach, TaskLosses
from recon.support.network.forward import Part, to_device
from recon.support.network.layers import unwrapped
from recon.support.network.state import state_kept
from recon.support.processes import average_, gather, world_size
from recon.support.random_states import global_states_kept
from recon.training.batches.accumulation import Update
from recon.training.batches.forward_pass import added_up, joint_losses, non_finite_tasks, part_losses
from recon.training.optimizers import take_step
from recon.training.recorder import Recorder, Step
from recon.training.run import TrainingRun
from recon.training.updater import Updater

logger = logging.getLogger(__name__)

Scalars = Mapping[str, Tensor]


class Stepper:
    """Takes the steps of a training; `clip` is the largest norm of an update, the recorder is told of every step."""

    def __init__(
        self, run: TrainingRun, losses: TaskLosses, clip: float | None = None, recorder: Recorder | None = None
    ) -> None:
        self.run = run
        self.losses = losses
        self.clip = clip
        self.recorder = recorder
        # The meter is another one in each epoch.
        self._update = Updater(
            run.model, losses, run.method, run.profiler, run.precision, lambda found: run.meter.check(found)
        )

    def take(self, updates: Iterable[Update]) -> None:
        """One optimizer step, with the mean of a few updates; none if no task is present."""
        run = self.run
        run.optimizer.zero_grad()
        done: list[_Done] = []
        for update in updates:
            done += self._differentiate(update.parts)
            run.end_batches(update.batches)
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
            run.method.after_step(self._losses_now(done[-1].parts))
        if self.recorder is not None:
            losses, weights = _mean([update.losses for update in done]), _mean([update.weights for update in done])
            if world_size() > 1:
                losses = average_losses(losses, self.losses.tasks, run.device)
            self.recorder.step(Step(run.epoch, run.steps, losses, weights, lr))

    def _differentiate(self, parts: Sequence[Part]) -> list[_Done]:
        """Accumulate an update into `.grad`; none if no task is present."""
        run = self.run
        parts = [to_device(part, run.device) for part in parts]
        if run.position[:2] == (1, 0):
            _warn_of_other_names(parts, self.losses)
        try:
            losses, weights = self._update(parts)
        except NonFiniteError:
            run.meter.check_pending()  # a loss that is NaN says more than its gradient
            raise
        if not losses and world_size() == 1:  # other ranks may have some
            return []
        run.meetings.note(losses)
        run.meter.add(losses, weights)
        return [_Done(parts, losses, _detached(weights))]

    def _refuse_non_finite(self, done: Sequence[_Done]) -> None:
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

    def _culprit(self, done: Sequence[_Done]) -> GradientError:
        run = self.run
        model, bad = unwrapped(run.model), set()
        for part in (part for update in done for part in update.parts):
            with state_kept(model), global_states_kept():
                bad |= non_finite_tasks(part_losses(model, part, self.losses, run.precision), model)
        everyone = set().union(*gather(bad))
        tasks = [task for task in self.losses.tasks if task in everyone]
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

    def _losses_now(self, parts: Sequence[Part]) -> Scalars:
        """The losses of a step that is done, computed again without changing any state."""
        run = self.run
        with state_kept(run.model), global_states_kept(), torch.no_grad():
            losses = added_up(list(joint_losses(run.model, parts, self.losses, run.precision)))
        anywhere = {task for tasks in gather(list(losses)) for task in tasks}
        return average_losses(losses, [task for task in self.losses.tasks if task in anywhere], run.device)


@dataclass(frozen=True)
class _Done:
    """An update that was made: what ran for it, the losses, and the weights that the method gave them."""

    parts: Sequence[Part]
    losses: Scalars
    weights: Scalars


def _warn_of_other_names(parts: Sequence[Part], losses: TaskLosses) -> None:
    """A misspelt name looks like a missing target, which is no error before the epoch's end."""
    if not isinstance(losses, LossOfEach):  # targets may have any names
        return
    present = {task for part in parts for task in losses.present(part)}
    missing = [task for task in losses.tasks if task not in present]
    others = [name for part in parts for name in part.targets if name not in losses.tasks]
    if missing and others:
        logger.warning(
            "The first batch has no target for %s, but it has targets for %s, which are not tasks. If these are the "
            "same under another name, use one name for both.",
            ", ".join(map(repr, missing)),
            ", ".join(map(repr, others)),
        )


def _detached(scalars: Scalars) -> dict[str, Tensor]:
    return {task: value.detach() for task, value in scalars.items()}


def _mean(tables: Sequence[Scalars]) -> Scalars:
    """The mean of each task over the tables that have it."""
    if len(tables) == 1:
        return tables[0]
    tasks = dict.fromkeys(task for table in tables for task in table)
    return {task: torch.stack([table[task] for table in tables if task in table]).mean() for task in tasks}
