"""Which tasks meet in the steps of a training: a profile needs two of them in a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recon.errors import UsageError
from recon.methods.updates.one_task_steps import FIRST, WHAT_TO_DO
from recon.support.processes import gather


class NobodyMeetsError(UsageError):
    """No two tasks were in one step, so that there is nothing to profile."""


def nobody_meets(steps: int, seen: Mapping[str, int]) -> NobodyMeetsError:
    """The error for steps of one task each, of which each task was `seen` in some."""
    counts = ", ".join(f"{task} in {count}" for task, count in sorted(seen.items()))
    return NobodyMeetsError(
        f"No two tasks have met in the first {steps} steps ({counts}): conflicts are those of tasks in the same step, "
        f"so there is nothing to count. {WHAT_TO_DO}"
    )


class Meetings:
    """Counts the tasks of the first updates of a training, until two of them meet."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.updates = 0
        self.settled = False

    def note(self, tasks: Iterable[str]) -> None:
        """Note the tasks of an update; all ranks must call it."""
        if self.settled:
            return
        everyone = {task for found in gather(list(tasks)) for task in found}
        self.updates += 1
        self.settled = len(everyone) > 1
        for task in everyone:
            self.seen[task] = self.seen.get(task, 0) + 1

    def refuse_none(self, tasks: int, epoch_ends: bool = False) -> None:
        """Refuse to profile a training of several tasks if no two of them have met by now.

        Raises:
            NobodyMeetsError: they have not, in the first updates, or in all of a shorter epoch.
        """
        if self.settled or tasks < 2 or (self.updates < FIRST and not epoch_ends) or not self.updates:
            return
        raise nobody_meets(self.updates, self.seen)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"seen": dict(self.seen), "updates": self.updates, "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.seen, self.updates, self.settled = dict(state["seen"]), state["updates"], state["settled"]
