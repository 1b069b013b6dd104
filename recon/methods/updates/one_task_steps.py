"""Warn of a method that acts between tasks and only ever meets one of them in a step: it would do nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from recon.methods.bases.method import Method
from recon.support.processes import gather

logger = logging.getLogger(__name__)

FIRST = 20
"""Steps after which at least two tasks should have met."""

WHAT_TO_DO = (
    "Join the tasks' batches: recon.joint_loader({'task name': loader, ...}) for recon.train and recon.profile, "
    "recon.Window(model, method) in a loop of your own, or recon.train(..., accumulate='tasks') (--accumulate tasks)."
)
"""For messages about tasks that never meet."""


@dataclass
class _Seen:
    steps: int = 0
    tasks: set[str] = field(default_factory=set)
    done: bool = False  # two tasks met, or the warning was given


_seen: WeakKeyDictionary[Method, _Seen] = WeakKeyDictionary()


def warn_of_one_task_steps(method: Method, tasks: Sequence[str]) -> None:
    """Note which tasks a step had, and warn once if the first steps of a method for several tasks had one each."""
    if method.works_alone:
        return
    seen = _seen.setdefault(method, _Seen())
    if seen.done:
        return
    here = {task for found in gather(tuple(tasks)) for task in found}
    seen.steps += 1
    seen.tasks |= here
    if len(here) > 1:
        seen.done = True
    elif seen.steps >= FIRST and len(seen.tasks.union(method.tasks)) > 1:
        seen.done = True
        logger.warning(
            "Method %r acts between tasks, but each of the first %d steps had one task alone (%s), so it did nothing: "
            "this is joint training. %s",
            method.name,
            seen.steps,
            ", ".join(sorted(seen.tasks)),
            WHAT_TO_DO,
        )
