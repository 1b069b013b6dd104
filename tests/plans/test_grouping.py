from itertools import combinations, pairwise, product

import networkx as nx
import numpy as np
import pytest

from recon.branching.partition import Partition, refine
from recon.errors import PlanError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import BINS, LayerConflicts
from recon.plans.grouping import (
    _improved,
    by_conflict,
    conflict_graph,
    fewest_conflicts,
    hierarchy,
    partitions,
)
from tests.cost_double import chain
from tests.maps.test_conflict_map import make_map, score_map

TASKS = tuple("abcdef")


def pair_map(layers, tasks=TASKS, observed=100):
    """A map with these conflicts: `{layer: {(task, task): count}}`, 0 where nothing is said."""
    pairs = list(combinations(tasks, 2))
    records = []
    for name, counts in layers.items():
        by_pair = np.array([counts.get(pair, 0) for pair in pairs])
        quarters = np.stack([by_pair - 3 * (by_pair // 4), *[by_pair // 4] * 3])
        seen = np.full((4, len(pairs)), observed // 4)
        histogram = np.zeros(BINS, dtype=np.int64)
        histogram[[0, -1]] = by_pair.sum(), seen.sum() - by_pair.sum()
        records.append(LayerConflicts(name, "Linear", {"weight": [1]}, histogram, quarters, seen))
    return ConflictMap(tuple(tasks), -0.1, observed, 0, (observed // 4,) * 4, records)


def drawn_map(seed, tasks, layers=5, high=20):
    rng = np.random.default_rng(seed)
    pairs = list(combinations(tasks, 2))
    return pair_map(
        {f"l{i}": dict(zip(pairs, rng.integers(0, high, len(pairs)).tolist(), strict=True)) for i in range(layers)},
        tasks,
    )


def camps(tasks, of, quiet=1, loud=40):
    """Conflicts of tasks in camps: loud between them, quiet within."""
    return {(a, b): quiet if of(a) == of(b) else loud for a, b in combinations(tasks, 2)}


def within(graph, partition):
    label = partition.label_of
    return sum(weight for a, b, weight in graph.edges(data="weight") if label[a] == label[b])


def test_the_graph_sums_the_conflicts_of_each_pair():
    cmap = make_map(layers=("x", "y"), tasks=("a", "b", "c"))
    graph = conflict_graph(cmap, cmap.tasks)
    assert isinstance(graph, nx.Graph) and list(graph) == ["a", "b", "c"]
    for column, (a, b) in enumerate(cmap.pairs):
        counts = [
            (int(layer.conflicts[:, column].sum()), int(layer.observed[:, column].sum())) for layer in cmap.layers
        ]
        conflicts, observed = map(sum, zip(*counts, strict=True))
        assert graph[a][b] == {"weight": conflicts, "observed": observed, "rate": conflicts / observed}
        assert conflict_graph(cmap, cmap.tasks, ["y"])[b][a]["weight"] == counts[1][0]
    assert sum(weight for *_, weight in graph.edges(data="weight")) == sum(cmap.scores().values())


def test_some_of_the_maps_tasks_in_another_order():
    cmap = drawn_map(0, TASKS)
    whole, part = conflict_graph(cmap, TASKS), conflict_graph(cmap, ("e", "b", "c"))
    assert list(part) == ["e", "b", "c"]
    assert all(part[a][b] == whole[a][b] for a, b in part.edges)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_fewest_conflicts_of_all_partitions(seed, n):
    graph = conflict_graph(drawn_map(seed, TASKS), TASKS)
    labelings = (labels for labels in product(range(n), repeat=6) if len(set(labels)) == n)
    groups = (
        [[t for t, label in zip(TASKS, labels, strict=True) if label == g] for g in range(n)] for labels in labelings
    )
    best = min(within(graph, Partition.of_groups(split, TASKS)) for split in groups)
    found = fewest_conflicts(graph, n)
    assert len(found.groups) == n
    assert within(graph, found) == best


@pytest.mark.parametrize("seed", range(3))
def test_more_tasks_end_where_no_move_and_no_swap_helps(seed):
    tasks = [f"t{i}" for i in range(12)]
    graph = conflict_graph(drawn_map(seed, tasks), tasks)
    found = fewest_conflicts(graph, 3)
    least = within(graph, found)
    assert len(found.groups) == 3 and found == fewest_conflicts(graph, 3)
    assert least <= within(graph, hierarchy(graph)[2])
    labels = found.labels
    changed = [(*labels[:i], group, *labels[i + 1 :]) for i in range(12) for group in range(3)]
    for i, j in combinations(range(12), 2):
        swapped = list(labels)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        changed.append(tuple(swapped))
    for other in changed:
        split = [[t for t, label in zip(tasks, other, strict=True) if label == g] for g in range(3)]
        if all(split):
            assert within(graph, Partition.of_groups(split, tasks)) >= least


@pytest.mark.parametrize("seed", range(4))
def test_from_any_start_no_move_and_no_swap_is_left_that_helps(seed):
    rng = np.random.default_rng(seed)
    tasks = [f"t{i}" for i in range(9)]
    weights = nx.to_numpy_array(conflict_graph(drawn_map(seed, tasks, layers=1, high=60), tasks), weight="weight")
    start = np.concatenate([[0, 1, 2], rng.integers(0, 3, 6)])
    labels = _improved(weights, start, 3)
    others = [np.where(np.arange(9) == i, group, labels) for i in range(9) for group in range(3)]
    for i, j in combinations(range(9), 2):
        swapped = labels.copy()
        swapped[[i, j]] = swapped[[j, i]]
        others.append(swapped)
    inner = [weights[np.equal.outer(other, other)].sum() for other in (labels, start, *others) if len(set(other)) == 3]
    assert inner[0] == min(inner) and len(set(labels)) == 3


def test_forty_tasks_of_three_camps_are_found():
    tasks = [f"t{i}" for i in range(40)]
    cmap = pair_map({"x": camps(tasks, lambda task: int(task[1:]) % 3)}, tasks)
    expected = Partition.of_groups([tasks[camp::3] for camp in range(3)], tasks)
    assert partitions(cmap, tasks, 3) == {"x": expected}
    assert partitions(cmap, tasks, "conflict") == {"x": expected}


@pytest.mark.parametrize("seed", range(3))
def test_the_hierarchy_nests_from_one_group_to_one_task_each(seed):
    cuts = hierarchy(conflict_graph(drawn_map(seed, TASKS), TASKS))
    assert [len(cut.groups) for cut in cuts] == [1, 2, 3, 4, 5, 6]
    assert all(refine(coarse, fine) == fine for coarse, fine in pairwise(cuts))


def test_the_tasks_that_conflict_least_merge_first():
    quiet = {("a", "d"): 1, ("b", "e"): 2}
    loud = {pair: 50 for pair in combinations(TASKS, 2) if pair not in quiet}
    cuts = hierarchy(conflict_graph(pair_map({"x": quiet | loud}), TASKS))
    assert cuts[4] == Partition.of_groups([["a", "d"], "b", "c", "e", "f"], TASKS)
    assert cuts[3] == Partition.of_groups([["a", "d"], ["b", "e"], "c", "f"], TASKS)


def test_each_layer_splits_as_finely_as_it_conflicts():
    cmap = pair_map(
        {
            "halves": camps(TASKS, lambda task: task in "abc", quiet=0, loud=60),
            "pairs": camps(TASKS, lambda task: "abcdef".index(task) // 2, quiet=0, loud=60),
            "all": dict.fromkeys(combinations(TASKS, 2), 60),
            "quiet": dict.fromkeys(combinations(TASKS, 2), 1),
        }
    )
    found = by_conflict(cmap, TASKS)
    assert len(found["all"].groups) == 6
    assert len(found["quiet"].groups) == 2  # a branched layer is split at all
    assert 2 <= len(found["halves"].groups) < len(found["pairs"].groups) < 6


@pytest.mark.parametrize("seed", range(4))
def test_no_other_cut_of_the_hierarchy_suits_a_layer_better(seed):
    cmap = drawn_map(seed, TASKS, high=80)
    cuts = hierarchy(conflict_graph(cmap, TASKS))[1:]
    counts = np.array([layer.conflicts.sum(axis=0) for layer in cmap.layers])
    tau = counts.mean() / 100

    def cost(layer, cut):
        inside = [cut.label_of[a] == cut.label_of[b] for a, b in cmap.pairs]
        return sum(c - 100 * tau for c, shares in zip(layer.conflicts.sum(axis=0), inside, strict=True) if shares)

    for layer in cmap.layers:
        found = by_conflict(cmap, TASKS)[layer.name]
        assert cost(layer, found) <= min(cost(layer, cut) for cut in cuts) + 1e-9


@pytest.mark.parametrize("groups", ["per-task", 2, 3, 6, "conflict", [["a", "b"], ["c", "d", "e", "f"]]])
def test_partitions_of_any_two_layers_nest(groups):
    found = list(partitions(drawn_map(1, TASKS, layers=8, high=90), TASKS, groups).values())
    assert len(found) == 8
    for one, other in combinations(found, 2):
        assert refine(one, other) in (one, other)


@pytest.mark.parametrize("groups", [3, "conflict"])
def test_forty_tasks_cost_as_many_times_the_trunk_as_there_are_groups(groups):
    tasks = [f"t{i}" for i in range(40)]
    layers = [f"l{i}" for i in range(6)]
    noise = np.random.default_rng(0)
    of = {task: int(noise.integers(3)) for task in tasks}
    counts = {
        layer: {p: c + int(noise.integers(4)) for p, c in camps(tasks, of.get, quiet=1, loud=60).items()}
        for layer in layers
    }
    split = partitions(pair_map(counts, tasks), tasks, groups)
    costs = chain([(100, 1000)] * 6, tasks)
    assert costs.of(split).macs_ratio == pytest.approx(3, abs=0.1)
    assert costs.of(dict.fromkeys(layers, Partition.per_task(tasks))).macs_ratio > 38


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (1, "6 tasks can form 2 to 6 groups"),
        (7, "6 tasks can form 2 to 6 groups"),
        (True, "Choose 'per-task'"),
        ("by-conflict", "Choose 'per-task', 'conflict', a number"),
        ([["a", "b"], ["c", "d"]], r"leave out \['e', 'f'\]"),
        ([["a", "b", "c", "d", "e", "f"]], "a single group branches nothing"),
        ([["a", "b", "c"], ["c", "d", "e", "f"]], "twice"),
        ([["a", "b", "c"], ["d", "e", "f", "g"]], "not one of the tasks"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(PlanError, match=message):
        partitions(drawn_map(0, TASKS), TASKS, groups)


@pytest.mark.parametrize("groups", [2, "conflict"])
def test_groups_need_the_conflicts_of_each_pair(groups):
    with pytest.raises(PlanError, match="does not hold the conflicts of each pair"):
        partitions(score_map({"x": 7}, tasks=TASKS), TASKS, groups)
    with pytest.raises(PlanError, match=r"has no counts for the tasks \['z'\]"):
        partitions(drawn_map(0, TASKS), ("a", "b", "z"), groups)
