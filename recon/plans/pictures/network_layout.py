"""How a branched network is laid out for a picture: stages of rows, each row a layer, each layer its lanes of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from recon.branching import Partition
from recon.branching.partition import Group, refine

if TYPE_CHECKING:
    from recon.plans.costing.cost_model import CostModel

Kind = Literal["once", "shared", "own"]

_STAGE_ROWS = 8  # a stage of more rows is split by the next part of its layers' names
_ROWS = 70  # with more, equal neighbours are drawn as one


@dataclass(frozen=True)
class Lane:
    """A layer as one group of tasks runs it.

    Args:
        tasks: the group.
        kind: `once` where the layer runs once, for all the tasks it serves; `shared` where it runs for each group
            with the same weights; `own` where each group has its own copy.
    """

    tasks: Group
    kind: Kind


@dataclass(frozen=True)
class LayerRow:
    """What is drawn at one height.

    Args:
        names: the layer; or several layers that each serve tasks of their own, such as heads; or that are drawn alike.
        lanes: the groups that run it.
        fork: `(before, after)` where values first fan out: the groups above this row, and from here on; else None.
    """

    names: tuple[str, ...]
    lanes: tuple[Lane, ...]
    fork: tuple[Partition, Partition] | None = None


@dataclass(frozen=True)
class Stage:
    """Layers of one module.

    Args:
        name: the module's path; empty for layers at the root.
        rows: in model order.
        plain_macs: forward multiply-adds in the unbranched network, on the example inputs.
        macs: the same in the branched one.
    """

    name: str
    rows: tuple[LayerRow, ...]
    plain_macs: int
    macs: int


@dataclass(frozen=True)
class Layout:
    """A branched network, ready to be drawn.

    Args:
        stages: from the input to the outputs.
        groups: the groups of tasks that share every copy of every layer.
        order: the tasks from left to right: every group's side by side, if the plan's groups nest.
    """

    stages: tuple[Stage, ...]
    groups: tuple[Group, ...]
    order: tuple[str, ...]

    @property
    def rows(self) -> list[LayerRow]:
        """All rows, from top to bottom."""
        return [row for stage in self.stages for row in stage.rows]


def network_layout(cost_model: CostModel, layers: Mapping[str, Partition]) -> Layout:
    """Lay out a network as a plan branches it: one layer at least."""
    finest = refine(*layers.values())
    runs = cost_model.of(layers).runs
    served = _served(cost_model, finest.tasks)
    lanes = {name: _lanes(name, served[name], layers, runs) for name in cost_model.layers}
    stages = [(stage, _packed([LayerRow((name,), lanes[name]) for name in names])) for stage, names in _stages(lanes)]
    stages = _forked(stages, layers, finest.tasks)
    if sum(len(rows) for _, rows in stages) > _ROWS:
        stages = [(stage, list(_merged(rows))) for stage, rows in stages]
    macs = _macs(cost_model, layers)
    totals = [
        [sum(macs.get(name, (0, 0))[which] for row in rows for name in row.names) for which in (0, 1)]
        for _, rows in stages
    ]
    return Layout(
        tuple(Stage(stage, tuple(rows), *total) for (stage, rows), total in zip(stages, totals, strict=True)),
        finest.groups,
        _order(finest.tasks, layers.values()),
    )


def _served(cost_model: CostModel, tasks: Group) -> dict[str, Group]:
    """`{layer name: the tasks it serves}`; all of them where the dataflow graph does not say."""
    served: dict[str, set[str]] = {name: set() for name in cost_model.layers}
    for _, node in cost_model.graph.nodes(data=True):
        if node["layer"] in served:
            served[node["layer"]].update(node["tasks"])
    return {name: tuple(task for task in tasks if task in found or not found) for name, found in served.items()}


def _lanes(
    name: str, served: Group, layers: Mapping[str, Partition], runs: Mapping[str, Partition]
) -> tuple[Lane, ...]:
    split = runs.get(name, layers.get(name))
    groups = split.restrict(served).groups if split else (served,)
    kind: Kind = "own" if name in layers else "shared" if len(groups) > 1 else "once"
    return tuple(Lane(group, kind) for group in groups)


def _stages(lanes: Mapping[str, Sequence[Lane]]) -> list[tuple[str, list[str]]]:
    """Neighbouring layers of one module, by the shortest paths that leave no stage with too many rows."""
    for depth in range(1, 1 + max(name.count(".") for name in lanes)):
        stages = [(stage, list(names)) for stage, names in groupby(lanes, partial(_module, depth))]
        if all(len(_packed([LayerRow((n,), tuple(lanes[n])) for n in names])) <= _STAGE_ROWS for _, names in stages):
            return stages
    return [(stage, list(names)) for stage, names in groupby(lanes, lambda name: name.rpartition(".")[0])]


def _module(depth: int, name: str) -> str:
    return ".".join(name.split(".")[:-1][:depth])


def _packed(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """Layers of one stage that serve different tasks go into the same rows: T heads need no more height than one."""
    packed: list[LayerRow] = []
    for row in rows:
        tasks = _tasks(row)
        last = next((number for number in reversed(range(len(packed))) if tasks & _tasks(packed[number])), -1)
        if last + 1 == len(packed):
            packed.append(row)
        else:
            beside = packed[last + 1]
            packed[last + 1] = LayerRow(beside.names + row.names, beside.lanes + row.lanes)
    return packed


def _forked(
    stages: list[tuple[str, list[LayerRow]]], layers: Mapping[str, Partition], tasks: Group
) -> list[tuple[str, list[LayerRow]]]:
    """Mark the layers where values first fan out."""
    so_far = Partition(tasks, (0,) * len(tasks))
    marked: list[tuple[str, list[LayerRow]]] = []
    for stage, rows in stages:
        marked.append((stage, []))
        for row in rows:
            after = refine(so_far, *(layers[name] for name in row.names if name in layers))
            marked[-1][1].append(replace(row, fork=(so_far, after) if after != so_far else None))
            so_far = after
    return marked


def _merged(rows: Iterable[LayerRow]) -> Iterator[LayerRow]:
    """Neighbours that are drawn alike, as one row."""
    last: LayerRow | None = None
    for row in rows:
        if last is not None and row.fork is None and row.lanes == last.lanes:
            last = replace(last, names=last.names + row.names)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _macs(cost_model: CostModel, layers: Mapping[str, Partition]) -> dict[str, tuple[int, int]]:
    """`{layer name: (multiply-adds unbranched, branched)}`; those of no layer count for the one before them."""
    operations = [node for _, node in cost_model.graph.nodes(data=True) if node["macs"]]
    plain, branched = cost_model.operation_macs({}), cost_model.operation_macs(layers)
    macs: dict[str, tuple[int, int]] = {}
    if len(operations) != len(plain):  # counted in evaluation mode, in which this forward does something else
        return macs
    current = cost_model.layers[0]
    for node, before, after in zip(operations, plain, branched, strict=True):
        current = node["layer"] or current
        known = macs.get(current, (0, 0))
        macs[current] = known[0] + before, known[1] + after
    return macs


def _tasks(row: LayerRow) -> set[str]:
    return {task for lane in row.lanes for task in lane.tasks}


def _order(tasks: Group, splits: Iterable[Partition]) -> tuple[str, ...]:
    """Coarse partitions decide first, so that finer groups lie within."""
    coarse_first = sorted(set(splits), key=lambda split: (len(split.groups), split.labels))
    return tuple(sorted(tasks, key=lambda task: [split.label_of[task] for split in coarse_first]))
