import random
from itertools import combinations

import pytest

from recon.branching.partition import Partition, group_name, join, refine
from recon.errors import PlanError
from tests.oracle import random_groups

TASKS = ("seg", "depth", "normal", "edge", "key")


def random_partition(draw, tasks=TASKS):
    return Partition.of_groups(random_groups(tasks, draw), tasks)


def together(partition):
    """The pairs of tasks that share a group."""
    return {pair for group in partition.groups for pair in combinations(group, 2)}


def test_one_group_per_task():
    partition = Partition.per_task(TASKS)
    assert partition.groups == tuple((task,) for task in TASKS)
    assert partition.label_of == {task: k for k, task in enumerate(TASKS)}


def test_groups_are_numbered_as_they_first_appear():
    partition = Partition.of_groups([["key", "edge"], "depth", ("normal", "seg")], TASKS)
    assert partition.groups == (("seg", "normal"), ("depth",), ("edge", "key"))
    assert partition == Partition.of_groups([["seg", "normal"], ["depth"], ["edge", "key"]], TASKS)
    assert [group_name(group) for group in partition.groups] == ["seg+normal", "depth", "edge+key"]


@pytest.mark.parametrize("seed", range(20))
def test_refinement_keeps_the_pairs_that_every_partition_keeps(seed):
    draw = random.Random(seed)
    partitions = [random_partition(draw) for _ in range(draw.randint(1, 4))]
    result = refine(*partitions)
    assert result.tasks == TASKS
    assert together(result) == set.intersection(*(together(p) for p in partitions))
    assert refine(*reversed(partitions)) == result == refine(result, *partitions)


@pytest.mark.parametrize("seed", range(20))
def test_restriction(seed):
    draw = random.Random(seed)
    partition, tasks = random_partition(draw), tuple(draw.sample(TASKS, 3))
    result = partition.restrict(tasks)
    assert result.tasks == tuple(task for task in TASKS if task in tasks)  # in the order of the run
    assert together(result) == {pair for pair in together(partition) if set(pair) <= set(tasks)}
    assert partition.restrict(("nobody",)).groups == ()


def test_refinement_covers_what_all_cover():
    partition = Partition.of_groups([["seg", "depth", "normal"], ["edge", "key"]], TASKS)
    narrower = Partition.per_task(TASKS).restrict(("depth", "normal", "edge"))
    assert refine(partition, narrower).groups == (("depth",), ("normal",), ("edge",))
    assert refine(partition.restrict(("seg",)), partition.restrict(("key",))).tasks == ()


@pytest.mark.parametrize("seed", range(20))
def test_joining_the_groups_parts_gives_the_finer_partition(seed):
    draw = random.Random(seed)
    outer, finer = random_partition(draw), random_partition(draw)
    parts = [finer.restrict(group) for group in outer.groups]
    assert join(outer, parts) == refine(outer, finer)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["seg", "depth"]], r"leave out \['normal'\]"),
        ([["seg", "depth"], ["normal", "seg"]], "name task 'seg' twice"),
        ([["seg", "depth"], ["normal", "edges"]], "'edges', which is not one of the tasks"),
        ([], "leave out"),
    ],
)
def test_groups_that_are_no_partition(groups, message):
    with pytest.raises(PlanError, match=message):
        Partition.of_groups(groups, TASKS[:3])


@pytest.mark.parametrize("name", ["", "a.b", "a+b"])
def test_names_that_cannot_be_part_of_a_parameters_name(name):
    with pytest.raises(PlanError, match="cannot be used: names become parts of parameter names"):
        Partition.per_task([name, "c"])
    with pytest.raises(PlanError, match="cannot be used"):
        Partition.of_groups([[name], "c"], [name, "c"])
