"""The conflict map file: one JSON object, written atomically, every field checked when it is read.

Version 2 lacks the counts at thresholds around S, the series by pair, the floor and the members of units.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import MapFileError
from recon.maps.counts import BINS, STAGES, Counts, LayerConflicts, LayerFloor
from recon.maps.files.checks import MOST_LAYERS, MOST_STEPS, MOST_TASKS, check, check_shapes
from recon.maps.score_table import ScoreTable, Table
from recon.support.files.documents import Document, read_document, shown
from recon.support.files.whole import write_text

FORMAT = "recon conflict map"
VERSION, OLDER = 3, (2,)
_REMEDY = "Make a new map with `recon profile`, or give another file."
_MOST = 10**16  # of an entry: a few hundred of them add up within int64


def write(cmap: ScoreTable, path: str | Path) -> None:
    """See `ConflictMap.save`."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "tasks": list(cmap.tasks),
        "threshold": cmap.threshold,
        "steps": cmap.steps,
        "skipped_non_finite": cmap.skipped,
        "stage_steps": list(cmap.stage_steps),
        "bin_steps": cmap.bin_steps,
        "pair_bin_steps": cmap.pair_bin_steps,
        "thresholds": list(cmap.thresholds),
        "made_by": cmap.made_by,
    }
    met = _dense(_values(cmap.met))
    lines = ",\n  ".join(_dense(_layer_to_json(layer)) for layer in cmap.layers)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "met": {met},\n "layers": [\n  {lines}\n ]\n}}\n'
    write_text(path, text)


def read(path: str | Path, kind: type[Table]) -> Table:
    """A table of this class; see `ConflictMap.load`."""
    document = read_document(path, MapFileError, _REMEDY)
    _refuse_scores(document)
    version = document.check_format(FORMAT, VERSION, ": not a conflict map", OLDER)
    tasks = document.names("tasks")
    if len(tasks) == 1:
        document.wrong(
            "tasks", f"is {shown(list(tasks))}, not a list of two or more different names (or none, unknown)"
        )
    _check_length(document, "tasks", MOST_TASKS)
    _check_length(document, "layers", MOST_LAYERS)
    pairs = len(tasks) * (len(tasks) - 1) // 2
    thresholds = _thresholds(document) if version == VERSION else ()
    cmap = kind(
        tasks=tasks,
        threshold=float(document.number("threshold")),
        steps=_count_or_none(document, "steps"),
        skipped=_count_or_none(document, "skipped_non_finite"),
        stage_steps=_stage_steps(document),
        layers=[_layer(layer, version, len(tasks), len(thresholds)) for layer in document.tables("layers")],
        made_by=document.get("made_by", dict),
        bin_steps=document.integer("bin_steps", most=MOST_STEPS),
        thresholds=thresholds,
        pair_bin_steps=document.integer("pair_bin_steps", most=MOST_STEPS) if version == VERSION else 0,
        met=_series_or_none(document, "met", (pairs,)) if version == VERSION else None,
    )
    if not cmap.layers:
        document.wrong("layers", "is empty")
    check(cmap, document.fail)
    return cmap


def _layer_to_json(layer: LayerConflicts) -> dict[str, Any]:
    return {
        "name": layer.name,
        "type": layer.kind,
        "shapes": layer.shapes,
        "parameters": layer.size,
        "score": layer.score,
        "histogram": _values(layer.histogram),
        "conflicts": _values(layer.conflicts),
        "observed": _values(layer.observed),
        "series": _values(layer.series),
        "below": _values(layer.below),
        "pair_series": _values(layer.pair_series),
        "members": list(layer.members),
        "floor": None if layer.floor is None else {key: _values(counts) for key, counts in vars(layer.floor).items()},
    }


def _dense(values: Any) -> str:
    """JSON without blanks between the values, which would be a third of the file."""
    return json.dumps(values, separators=(",", ": "))


def _values(counts: Counts | None) -> list[Any] | None:
    return None if counts is None else counts.tolist()


def _refuse_scores(document: Document) -> None:
    """Refuse a file of the published code, and name the command that reads it."""
    if document.values and all(type(document.values[key]) is int for key in document):
        document.wrong("format", "is missing: not a conflict map; `recon map import` reads the published code's scores")


def _check_length(document: Document, key: str, most: int) -> None:
    length = len(document.get(key, list))
    if length > most:
        document.wrong(key, f"has {length} entries; recon reads maps of at most {most}")


def _count_or_none(document: Document, key: str) -> int | None:
    return None if document.get(key, int, type(None)) is None else document.integer(key, most=MOST_STEPS)


def _stage_steps(document: Document) -> tuple[int, ...]:
    return tuple(_counts(document, "stage_steps", (STAGES,)).tolist()) if document.get("stage_steps", list) else ()


def _counts(document: Document, key: str, shape: Sequence[int]) -> Counts:
    try:
        array = np.array(document.get(key, list))
    except ValueError:
        array = np.array(None)
    whole = array.dtype.kind == "i" and array.shape == tuple(shape)
    if not whole or not ((array >= 0) & (array <= _MOST)).all():
        document.wrong(key, f"is not an array of counts of shape {tuple(shape)}")
    return array.astype(np.int64)


def _counts_or_none(document: Document, key: str, shape: Sequence[int]) -> Counts | None:
    return None if document.get(key, list, type(None)) is None else _counts(document, key, shape)


def _series_or_none(document: Document, key: str, shape: Sequence[int] = ()) -> Counts | None:
    """Counts of any length along time, and then of this shape."""
    values = document.get(key, list, type(None))
    return None if values is None else _counts(document, key, (len(values), *shape))


def _thresholds(document: Document) -> tuple[float, ...]:
    values = document.get("thresholds", list)
    if not all(type(value) in (int, float) and abs(value) <= 1 for value in values):
        document.wrong("thresholds", "is not a list of thresholds")
    return tuple(map(float, values))


def _layer(layer: Document, version: int, tasks: int, thresholds: int) -> LayerConflicts:
    shapes = layer.table("shapes")
    for name in shapes:
        shapes.counts(name)
    check_shapes(shapes.values, _count_or_none(layer, "parameters"), layer)
    pairs = tasks * (tasks - 1) // 2
    record = LayerConflicts(
        name=layer.text("name"),
        kind=layer.text("type"),
        shapes=shapes.values,
        histogram=_counts_or_none(layer, "histogram", (BINS,)),
        conflicts=_counts_or_none(layer, "conflicts", (STAGES, pairs)),
        observed=_counts_or_none(layer, "observed", (STAGES, pairs)),
        series=_series_or_none(layer, "series"),
        score=_count_or_none(layer, "score"),
    )
    if version < VERSION:
        return record
    return replace(
        record,
        below=_counts_or_none(layer, "below", (thresholds, pairs)),
        pair_series=_series_or_none(layer, "pair_series", (pairs,)),
        members=layer.names("members"),
        floor=None if layer.get("floor", dict, type(None)) is None else _floor(layer.table("floor"), tasks, thresholds),
    )


def _floor(floor: Document, tasks: int, thresholds: int) -> LayerFloor:
    pairs = tasks * (tasks - 1) // 2
    return LayerFloor(
        observed=_counts(floor, "observed", (tasks,)),
        conflicts=_counts(floor, "conflicts", (thresholds, tasks)),
        across_observed=_counts(floor, "across_observed", (pairs,)),
        across_conflicts=_counts(floor, "across_conflicts", (thresholds, pairs)),
    )
