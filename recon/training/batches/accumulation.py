"""Which batches make one optimizer step: so many of them, or as many as it takes to see every task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from recon.errors import UsageError
from recon.problems.losses import TaskLosses
from recon.support.network.forward import Batch, Part, batch_parts
from recon.support.processes import gather

Accumulate = int | Literal["tasks"]
"""So many batches for one step, or one joint step of the batches in which each task has been seen."""

_LONGEST = 50  # batches, times the number of tasks, that are kept in memory for one joint step


def check_accumulate(accumulate: object) -> None:
    """Check that it says how many batches make a step."""
    if accumulate == "tasks":
        return
    if not isinstance(accumulate, int) or isinstance(accumulate, bool):
        raise UsageError(f"accumulate is {accumulate!r}. Give a number of batches, or 'tasks'.")
    if accumulate < 1:
        raise UsageError(f"accumulate is {accumulate}; a step needs at least 1 batch.")


class Update(NamedTuple):
    """What the method makes one update of: the parts of a batch, or of several, and how many batches those are."""

    parts: Sequence[Part]
    batches: int = 1


def updates_in_step(accumulate: Accumulate) -> int:
    """Of how many updates a step is the mean."""
    return 1 if accumulate == "tasks" else accumulate


def updates_of(batches: Iterable[Batch], accumulate: Accumulate, losses: TaskLosses) -> Iterator[Update]:
    """The updates of an epoch: of each batch, or of as many as it takes to see each of the tasks."""
    if accumulate == "tasks":
        return _with_all_tasks(iter(batches), losses)
    return (Update(batch_parts(batch)) for batch in batches)


def _with_all_tasks(batches: Iterator[Batch], losses: TaskLosses) -> Iterator[Update]:
    while (batch := next(batches, None)) is not None:
        parts, number = batch_parts(batch), 1
        missing = set(losses.tasks).difference(*map(losses.present, parts))
        # A task that another rank has seen takes part in the step; so all ranks draw the same number of batches.
        while missing := set.intersection(*gather(missing)):
            if number == _LONGEST * len(losses.tasks):
                raise UsageError(
                    f"{number} batches in a row had no target for {', '.join(map(repr, sorted(missing)))}, and "
                    "accumulate='tasks' keeps batches until each task has been seen. If a task is that rare, give it a "
                    "loader of its own, and join the loaders: recon.joint_loader({'task name': loader, ...})."
                )
            if (batch := next(batches, None)) is None:
                break
            found = batch_parts(batch)
            number, parts = number + 1, parts + found
            missing = missing.difference(*map(losses.present, found))
        yield Update(parts, number)
