"""Fans in any structure of tuples, lists, dicts and dataclasses."""

from __future__ import annotations

from typing import Any

from recon.branching.fans.fan import TaskFan
from recon.branching.fans.value import common_refinement, fans_in, refuse_lost_gradients
from recon.branching.fans.watch import watcher
from recon.branching.partition import Group, Partition
from recon.errors import FanError
from recon.support.network.trees import map_tree


def restrict(structure: Any, tasks: Group) -> Any:
    """The structure, with its fans restricted to some tasks."""
    return map_tree(lambda leaf: leaf.restrict(tasks) if type(leaf) is TaskFan else leaf, structure)


def within(structure: Any, group: Group) -> Any:
    """The structure as one group of tasks sees it: plain values wherever the group's tasks agree."""

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        inner = leaf.restrict(group)
        return inner._by_group[0] if len(inner._by_group) == 1 else inner

    return map_tree(pick, structure)


def value_for(structure: Any, task: str) -> Any:
    """The structure as one task sees it: plain values where the fans were."""

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        if watcher():
            refuse_lost_gradients([leaf])
        if task not in leaf._partition.label_of:
            raise FanError(f"The output of task {task!r} holds values computed only for {list(leaf._partition.tasks)}.")
        return leaf.for_group((task,))

    return map_tree(pick, structure)


def partition_of(structure: Any) -> Partition | None:
    """The common refinement of the fans in a structure; `None` if it holds none."""
    partitions = [fan._partition for fan in fans_in(structure)]
    return common_refinement(partitions) if partitions else None
