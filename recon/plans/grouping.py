"""Which tasks keep sharing a branched layer: partitions of the conflict graph, all of which nest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from recon.branching import Partition
from recon.errors import PlanError, shortened
from recon.maps import ConflictMap
from recon.maps.measures import By

Groups = str | int | Sequence[str | Sequence[str]]
"""`"per-task"`, `"conflict"`, how many groups, or the groups themselves."""

_ENUMERATED = 8  # tasks: 4,140 partitions in all
_UNKNOWN = 1e-6  # how much more than usual a pair that never met is taken to conflict, as a rate

Matrix = NDArray[np.float64]


def conflict_graph(
    cmap: ConflictMap, tasks: Sequence[str], layers: Sequence[str] | None = None, by: By = "count"
) -> nx.Graph:
    """The tasks as a complete graph, with the conflicts of each pair at the map's own threshold on its edges.

    An edge has, summed over `layers` or over all of the map's, the `observed` gradient pairs, the `rate` of conflict
    among them, and the `weight`: the conflicts at this rate, had every pair met as often as the one that met most. By
    excess, only what lies above the noise floor is conflict. A pair that never met may conflict or not: it gets the
    mean rate of those that did, and a little more, so that of two equals the known one is preferred.

    Raises:
        PlanError: the map does not hold the conflicts of these pairs, or none of them ever met.
    """
    conflicts, observed = _by_pair(cmap, tasks, by)
    chosen = [layer.name in layers if layers is not None else True for layer in cmap.layers]
    conflicts, observed = conflicts[chosen].sum(axis=0), observed[chosen].sum(axis=0)
    if not observed.any():
        raise PlanError(
            f"No two of the tasks {shortened(tasks)} ever met in a step of the profile, so nothing is known to group "
            "them by. Profile them in joint steps (recon.joint_loader), or list the groups yourself."
        )
    most, usual = observed.max(), conflicts.sum() / observed.sum() + _UNKNOWN
    graph = nx.Graph()
    graph.add_nodes_from(tasks)
    for (a, first), (b, second) in combinations(enumerate(tasks), 2):
        seen = observed[a, b]
        weight, rate = (conflicts[a, b] * (most / seen), conflicts[a, b] / seen) if seen else (usual * most, usual)
        graph.add_edge(first, second, weight=float(weight), observed=int(seen), rate=float(rate))
    return graph


def partitions(
    cmap: ConflictMap, tasks: Sequence[str], groups: Groups = "per-task", by: By = "count"
) -> dict[str, Partition]:
    """How each layer of the map splits the tasks, should it be branched.

    Any two of these partitions nest: one of them refines the other. So wherever values of branched layers meet, they
    are in no more groups than the finest of those layers, and T tasks in n groups cost at most n times the trunk.

    `"per-task"` gives every task a copy (Shi et al. 2023); a number n splits all layers alike, into the n groups that
    leave the fewest conflicts within (see `fewest_conflicts`); `"conflict"` lets every layer decide how finely it
    splits (see `by_conflict`); a list of groups is used as it is. What conflicts is told by how often a pair conflicts
    where it meets, not by how often it meets: see `conflict_graph`.
    """
    if groups == "conflict":
        return by_conflict(cmap, tasks, by)
    return dict.fromkeys((layer.name for layer in cmap.layers), _for_all_layers(cmap, tasks, groups, by))


def _for_all_layers(cmap: ConflictMap, tasks: Sequence[str], groups: Groups, by: By) -> Partition:
    match groups:
        case "per-task":
            return Partition.per_task(tasks)
        case bool() | str():
            raise PlanError(f"groups is {groups!r}. Choose 'per-task', 'conflict', a number, or a list of groups.")
        case int():
            if not 2 <= groups <= len(tasks):
                raise PlanError(f"groups is {groups}, but {len(tasks)} tasks can form 2 to {len(tasks)} groups.")
            if groups == len(tasks):
                return Partition.per_task(tasks)
            return fewest_conflicts(conflict_graph(cmap, tasks, by=by), groups)
    partition = Partition.of_groups(groups, tasks)
    if len(partition.groups) < 2:
        raise PlanError(f"groups is {list(groups)}: a single group branches nothing. Give two or more.")
    return partition


def fewest_conflicts(graph: nx.Graph, n: int) -> Partition:
    """The partition of the tasks into n groups with the least `weight` within groups.

    Exact, by enumeration, for up to eight tasks. For more of them (this is max n-cut, which is NP-hard): the better of
    two starts, a cut of the `hierarchy` and a greedy one, each improved until no task's move and no swap of two helps.
    """
    weights = nx.to_numpy_array(graph, weight="weight")
    if len(graph) <= _ENUMERATED:
        candidates: Iterator[NDArray[np.int64]] = _all_labels(len(graph), n)
    else:
        starts = np.array(hierarchy(graph)[n - 1].labels), _greedy(weights, n)
        candidates = (_improved(weights, labels, n) for labels in starts)
    return _partition(graph, min(candidates, key=lambda labels: float(weights[np.equal.outer(labels, labels)].sum())))


def hierarchy(graph: nx.Graph) -> list[Partition]:
    """Partitions into 1, 2, ..., T groups, each of which refines the one before.

    From agglomerative clustering: the two groups whose tasks have the lowest mean conflict `rate` merge first.
    """
    rates = nx.to_numpy_array(graph, weight="rate")
    cuts = cut_tree(linkage(squareform(rates), method="average"))  # a column each, finest first
    return [_partition(graph, labels) for labels in cuts.T[::-1]]


def by_conflict(cmap: ConflictMap, tasks: Sequence[str], by: By = "count") -> dict[str, Partition]:
    """For each layer, the cut of one common `hierarchy` that keeps together what conflicts less than usual there.

    With tau the mean conflict rate of all layers and pairs, a pair of tasks that shares a layer costs its rate there
    and saves the tau that is usual; a layer gets the cut with the least sum over the pairs that share it, which is
    correlation clustering (Bansal, Blum and Chawla, Machine Learning 2004) along the hierarchy. A pair that never met
    has the layer's mean rate. At least two groups: a branched layer is split.
    """
    graph = conflict_graph(cmap, tasks, by=by)
    cuts = hierarchy(graph)[1:]
    conflicts, observed = _by_pair(cmap, tasks, by)
    tau = conflicts.sum() / observed.sum()
    mean = np.array([c.sum() / o.sum() if o.any() else tau for c, o in zip(conflicts, observed, strict=True)])
    above = np.divide(conflicts, observed, out=np.full_like(conflicts, tau), where=observed > 0) - tau
    unmet = nx.to_numpy_array(graph, weight="observed") + np.eye(len(tasks)) == 0
    above[:, unmet] = (mean - tau + _UNKNOWN)[:, None]
    together = np.stack([np.equal.outer(cut.labels, cut.labels) for cut in cuts])
    costs = np.einsum("lij,kij->lk", above, together)
    return {layer.name: cuts[k] for layer, k in zip(cmap.layers, costs.argmin(axis=1), strict=True)}


def _by_pair(cmap: ConflictMap, tasks: Sequence[str], by: By) -> tuple[Matrix, Matrix]:
    """(layers, T, T) conflicts and gradient pairs seen, each symmetric; by excess, conflicts above the noise floor."""
    unknown = [task for task in tasks if task not in cmap.tasks]
    if unknown or any(layer.conflicts is None or layer.observed is None for layer in cmap.layers):
        what = f"has no counts for the tasks {unknown}" if unknown else "does not hold the conflicts of each pair"
        raise PlanError(
            f"Tasks are grouped by how often each pair of them conflicted, but the map {what}. Profile with recon, "
            "use groups='per-task', or list the groups yourself."
        )
    seen = cmap.pair_observations()
    conflicts = cmap.pair_conflicts()
    if by == "excess":
        conflicts = np.nan_to_num(np.clip(conflicts - cmap.pair_floors() * seen, 0, None))
    number = {task: i for i, task in enumerate(tasks)}
    pairs = [(i, number[a], number[b]) for i, (a, b) in enumerate(cmap.pairs) if a in number and b in number]
    column, row, other = np.array(pairs).T
    result = np.zeros((2, len(cmap.layers), len(tasks), len(tasks)))
    for table, counts in zip(result, (conflicts, seen), strict=True):
        table[:, row, other] = table[:, other, row] = counts[:, column]
    return result[0], result[1]


def _partition(graph: nx.Graph, labels: NDArray[np.int64]) -> Partition:
    groups = [
        [task for task, label in zip(graph, labels, strict=True) if label == group] for group in np.unique(labels)
    ]
    return Partition.of_groups(groups, tuple(graph))


def _all_labels(tasks: int, n: int) -> Iterator[NDArray[np.int64]]:
    """Every partition into n groups once: a new group's number is the lowest that is free."""

    def extend(labels: list[int], used: int) -> Iterator[list[int]]:
        left = tasks - len(labels)
        if left == 0:
            yield labels
        elif used + left >= n:
            for label in range(min(used + 1, n)):
                yield from extend([*labels, label], max(used, label + 1))

    return (np.array(labels) for labels in extend([], 0) if max(labels) == n - 1)


def _greedy(weights: Matrix, n: int) -> NDArray[np.int64]:
    """The tasks with most conflict first, each into the group with which it conflicts least; no group is empty."""
    order = np.argsort(-weights.sum(axis=0), kind="stable")
    labels = np.full(len(weights), -1)
    for place, task in enumerate(order):
        inner = [weights[task, labels == group].sum() for group in range(n)]
        labels[task] = place if place < n else int(np.argmin(inner))
    return labels


def _improved(weights: Matrix, labels: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Steepest descent by moves of one task and swaps of two; a group's last task, without a conflict in it, stays."""
    labels = labels.copy()
    tasks = np.arange(len(labels))
    while True:
        to_group = weights @ np.eye(n)[labels]  # (T, n): a task's conflicts with each group
        own = to_group[tasks, labels]
        moves = to_group - own[:, None]
        swaps = to_group[:, labels] - own[:, None]
        swaps = swaps + swaps.T - 2 * weights
        swaps[np.equal.outer(labels, labels)] = 0
        if min(moves.min(), swaps.min()) >= 0:
            return labels
        if moves.min() <= swaps.min():
            task, group = np.unravel_index(moves.argmin(), moves.shape)
            labels[task] = group
        else:
            one, other = np.unravel_index(swaps.argmin(), swaps.shape)
            labels[[one, other]] = labels[[other, one]]
