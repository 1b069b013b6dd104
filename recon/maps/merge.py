"""Conflict maps of several runs added up into one, so that a ranking rests on more than one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from recon.errors import MapMismatchError, UsageError, shortened
from recon.maps.counts import Counts, LayerConflicts, LayerFloor, threshold_bin
from recon.maps.score_table import ScoreTable, Table


def merge(maps: Sequence[Table], names: Sequence[str] = ()) -> Table:
    """See `ConflictMap.merge`."""
    if len(maps) < 2:
        raise UsageError(f"Merging takes two or more maps, but got {len(maps)}.")
    names = names or [f"map {number}" for number in range(1, len(maps) + 1)]
    first = maps[0]
    for cmap, name in zip(maps[1:], names[1:], strict=True):
        why = _why_not(first, cmap)
        if why:
            raise MapMismatchError(f"{name} cannot be added to {names[0]}: {why}")
    for (one, name), (other, other_name) in combinations(zip(maps, names, strict=True), 2):
        if _same_counts(one, other):
            raise UsageError(
                f"{name} and {other_name} hold exactly the same counts, so one run would count twice. Merge maps of "
                "different runs, such as profiles with different seeds."
            )
    thresholds = _common_thresholds(maps)
    aligned = [_aligned(cmap, first, thresholds) for cmap in maps]
    stage_steps = [cmap.stage_steps for cmap in maps]
    return replace(
        first,
        steps=_total([cmap.steps for cmap in maps]),
        skipped=_total([cmap.skipped for cmap in maps]),
        stage_steps=tuple(map(sum, zip(*stage_steps, strict=True))) if all(stage_steps) else (),
        layers=[_sum_layers(records) for records in zip(*(cmap.layers for cmap in aligned), strict=True)],
        made_by=_made_by(maps, names),
        bin_steps=0,
        thresholds=thresholds,
        pair_bin_steps=0,
        met=None,
    )


def _why_not(first: ScoreTable, cmap: ScoreTable) -> str:
    """Why the counts of the two cannot be added up; empty if they can."""
    if set(first.tasks) != set(cmap.tasks):
        tasks, others = (", ".join(of.tasks) or "unknown" for of in (cmap, first))
        return f"its tasks are {tasks}, the other's {others}. `recon map compare` takes maps of different tasks."
    if threshold_bin(first.threshold) != threshold_bin(cmap.threshold):
        return (
            f"its threshold is {cmap.threshold:g}, the other's {first.threshold:g}. The counts by task pair and "
            "quarter are kept only at a map's own S. Profile both with the same threshold."
        )
    here, there = ({layer.name: layer for layer in of.layers} for of in (first, cmap))
    missing, extra = [name for name in here if name not in there], [name for name in there if name not in here]
    if missing or extra:
        differs = [f"lacks {shortened(missing)}"] * bool(missing) + [f"has {shortened(extra)} besides"] * bool(extra)
        return f"it {' and '.join(differs)}. Merge maps of the same layers."
    reshaped = [name for name in here if here[name].shapes != there[name].shapes]
    if reshaped:
        return f"the parameters of {shortened(reshaped)} have other shapes. Merge maps of the same model."
    regrouped = [name for name in here if here[name].members != there[name].members]
    if regrouped:
        return f"{shortened(regrouped)} join other layers. Merge maps of the same units."
    for key, title in (("histogram", "cosines"), ("conflicts", "counts by task pair")):
        known = [getattr(of.layers[0], key) is not None for of in (first, cmap)]
        if known[0] != known[1]:
            return f"one of them holds no {title}. Merge maps that hold the same."
    return ""


def _same_counts(one: ScoreTable, other: ScoreTable) -> bool:
    others = {layer.name: layer for layer in other.layers}
    if not any(one.scores().values()):  # without a conflict, equal counts do not mean the same run
        return one is other
    return one.scores() == other.scores() and all(
        np.array_equal(_or_empty(layer.histogram), _or_empty(others[layer.name].histogram)) for layer in one.layers
    )


def _or_empty(counts: Counts | None) -> Counts:
    return np.zeros(0, dtype=np.int64) if counts is None else counts


def _common_thresholds(maps: Sequence[ScoreTable]) -> tuple[float, ...]:
    """The thresholds at which all of them have counts by pair; at its own S each has."""
    if any(layer.conflicts is None for cmap in maps for layer in cmap.layers):
        return ()
    bins = set.intersection(*({threshold_bin(s) for s in (cmap.threshold, *cmap.thresholds)} for cmap in maps))
    return tuple((below - 100) / 100 for below in sorted(bins))


def _aligned(cmap: Table, first: ScoreTable, thresholds: Sequence[float]) -> Table:
    """The same map with its layers, its tasks and its task pairs in the order of the first, at these thresholds."""
    layers = {layer.name: layer for layer in cmap.layers}
    own_pairs = [frozenset(pair) for pair in cmap.pairs]
    pairs = [own_pairs.index(frozenset(pair)) for pair in first.pairs]
    tasks = [cmap.tasks.index(task) for task in first.tasks]
    kept = [threshold_bin(s) for s in cmap.thresholds]
    rows = [kept.index(threshold_bin(s)) for s in thresholds] if kept else []

    def reordered(layer: LayerConflicts) -> LayerConflicts:
        floor = layer.floor
        return replace(
            layer,
            conflicts=_columns(layer.conflicts, pairs),
            observed=_columns(layer.observed, pairs),
            below=_columns(_below(layer, rows), pairs),
            floor=None
            if floor is None
            else LayerFloor(
                floor.observed[tasks],
                floor.conflicts[rows][:, tasks],
                floor.across_observed[pairs],
                floor.across_conflicts[rows][:, pairs],
            ),
        )

    return replace(cmap, tasks=first.tasks, layers=[reordered(layers[of.name]) for of in first.layers])


def _below(layer: LayerConflicts, rows: Sequence[int]) -> Counts | None:
    """(thresholds, pairs); a layer that has counts at its own threshold alone has those."""
    if layer.conflicts is None or layer.below is not None:
        return None if layer.below is None else layer.below[list(rows)]
    return layer.conflicts.sum(axis=0, keepdims=True)


def _columns(counts: Counts | None, order: Sequence[int]) -> Counts | None:
    return None if counts is None else counts[:, list(order)]


def _sum_layers(records: Sequence[LayerConflicts]) -> LayerConflicts:
    """One layer of all the runs; without series, since a stretch of training cannot run from one into the next."""
    return replace(
        records[0],
        histogram=_total([record.histogram for record in records]),
        conflicts=_total([record.conflicts for record in records]),
        observed=_total([record.observed for record in records]),
        series=None,
        score=_total([record.score for record in records]),
        below=_total([record.below for record in records]),
        pair_series=None,
        floor=_sum_floors([record.floor for record in records if record.floor is not None]),
    )


def _sum_floors(floors: Sequence[LayerFloor]) -> LayerFloor | None:
    """Of the runs that took one."""
    if not floors:
        return None
    return LayerFloor(**{key: sum(getattr(floor, key) for floor in floors) for key in vars(floors[0])})


def _total(values: Sequence[Any]) -> Any:
    """The sum; unknown if one of them is."""
    return None if any(value is None for value in values) else sum(values[1:], values[0])


def _made_by(maps: Sequence[ScoreTable], names: Sequence[str]) -> dict[str, Any]:
    """What the runs have in common in `made_by`, and what each has of its own."""
    first = maps[0].made_by
    common = {key: value for key, value in first.items() if all(cmap.made_by.get(key) == value for cmap in maps)}
    sources = [
        {"map": name, **{key: value for key, value in cmap.made_by.items() if key not in common}}
        for cmap, name in zip(maps, names, strict=True)
    ]
    return {**common, "merged": sources}
