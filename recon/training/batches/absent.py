"""The error for tasks that take part in no batch of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recon.errors import ProblemError
from recon.problems.losses import LossOfBatch, TaskLosses
from recon.support.loaders import all_inner_loaders
from recon.support.network.forward import Batch
from recon.training.batches.joint_batches import JointLoader


def nothing_for(tasks: Sequence[str], whose: str, losses: TaskLosses, loader: Iterable[Batch]) -> ProblemError:
    """The error for `tasks` that no batch had anything for; `whose` says which batches those are: "of epoch 1"."""
    names = ", ".join(map(repr, tasks))
    if isinstance(losses, LossOfBatch):
        return ProblemError(
            f"No batch {whose} had a loss for {names}: your loss gave None for {names} in every batch, or left it out; "
            "or there was no batch. Leave it out of tasks=, or let the loss give a scalar where there is a target."
        )
    joined = any(isinstance(each, JointLoader) for each in (loader, *all_inner_loaders(loader).values()))
    form = (
        "{task name: (inputs, target)}" if joined else "(inputs, {task name: target}) or {task name: (inputs, target)}"
    )
    return ProblemError(
        f"No batch {whose} had a target for {names}. The loader yields {form}: check the names, that it is not empty, "
        "and that neither targets nor losses are always None. Or leave the task out of the losses."
    )
