"""Partition: how the tasks are split into groups, for one layer or for one value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from recon.errors import PlanError

Group = tuple[str, ...]


def group_name(group: Group) -> str:
    """The name of a group in parameter names: its tasks joined by `+`."""
    return "+".join(group)


@dataclass(frozen=True)
class Partition:
    """A partition of tasks into groups.

    Args:
        tasks: the tasks, in the order of the run.
        labels: the number of each task's group; groups are numbered as they first appear.
    """

    tasks: tuple[str, ...]
    labels: tuple[int, ...]

    @classmethod
    def per_task(cls, tasks: Sequence[str]) -> Partition:
        """One group per task, as in Recon (Shi et al. 2023, sec. 3.3).

        Raises:
            PlanError: a task's name cannot be part of a parameter's name.
        """
        return cls(_checked(tasks), tuple(range(len(tasks))))

    @classmethod
    def of_groups(cls, groups: Iterable[Iterable[str]], tasks: Sequence[str]) -> Partition:
        """The partition with these groups.

        Raises:
            PlanError: a task is in no group or in two, or a group names a task that is not in `tasks`.
        """
        tasks = _checked(tasks)
        groups = [[group] if isinstance(group, str) else list(group) for group in groups]
        known = set(tasks)
        label: dict[str, int] = {}
        for number, group in enumerate(groups):
            for task in group:
                if task not in known:
                    raise PlanError(f"Groups {groups} name {task!r}, which is not one of the tasks {list(tasks)}.")
                if task in label:
                    raise PlanError(f"Groups {groups} name task {task!r} twice; each task goes into one group.")
                label[task] = number
        missing = [task for task in tasks if task not in label]
        if missing:
            raise PlanError(f"Groups {groups} leave out {missing}; each task goes into one group.")
        return _canonical(tasks, tuple(label[task] for task in tasks))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, each a tuple of tasks."""
        members: list[list[str]] = [[] for _ in range(max(self.labels, default=-1) + 1)]
        for task, label in zip(self.tasks, self.labels, strict=True):
            members[label].append(task)
        return tuple(tuple(group) for group in members)

    @cached_property
    def label_of(self) -> dict[str, int]:
        """`{task: number of its group}`."""
        return dict(zip(self.tasks, self.labels, strict=True))

    @lru_cache(maxsize=4096)  # noqa: B019  (partitions are few, small and live as long as the process)
    def restrict(self, tasks: Group) -> Partition:
        """The same groups, for some of the tasks only."""
        wanted = set(tasks)
        kept = [task for task in self.tasks if task in wanted]
        return _canonical(tuple(kept), tuple(self.label_of[task] for task in kept))


@lru_cache(maxsize=4096)
def refine(*partitions: Partition) -> Partition:
    """The common refinement: two tasks share a group if they do in every one of `partitions`.

    It covers the tasks that all of them cover.
    """
    first, *rest = partitions
    tasks = tuple(t for t in first.tasks if all(t in p.label_of for p in rest))
    return _canonical(tasks, tuple(tuple(p.label_of[t] for p in partitions) for t in tasks))


def join(outer: Partition, parts: Sequence[Partition]) -> Partition:
    """`outer` with each of its groups split further: `parts[i]` is a partition of the i-th group."""
    keys = tuple((label, parts[label].label_of[t]) for t, label in zip(outer.tasks, outer.labels, strict=True))
    return _canonical(outer.tasks, keys)


def _checked(tasks: Iterable[str]) -> tuple[str, ...]:
    tasks = tuple(tasks)
    for task in tasks:
        if not task or "." in task or "+" in task:
            raise PlanError(
                f"Task name {task!r} cannot be used: names become parts of parameter names, so they must not be empty "
                "nor contain '.' or '+'. Rename the task, for example with '_'."
            )
    return tasks


def _canonical(tasks: tuple[str, ...], keys: tuple[object, ...]) -> Partition:
    number: dict[object, int] = {}
    return Partition(tasks, tuple(number.setdefault(key, len(number)) for key in keys))
