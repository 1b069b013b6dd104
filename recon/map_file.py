"""The conflict map file: one JSON object, written atomically, every field checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recon.conflict_map import BINS, STAGES, ConflictMap, Counts, LayerConflicts
from recon.errors import MapFileError
from recon.files import write_text
from recon.map_checks import MOST_LAYERS, MOST_STEPS, MOST_TASKS, check, check_shapes

FORMAT = "recon conflict map"
VERSION = 2
_INT_OR_NONE = (int, type(None))
_MOST = 10**16  # of an entry: a few hundred of them add up within int64


def save(cmap: ConflictMap, path: str | Path) -> None:
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
        "made_by": cmap.made_by,
    }
    lines = [json.dumps(_layer_to_json(layer)) for layer in cmap.layers]
    text = json.dumps(head, indent=1)[:-2] + ',\n "layers": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    write_text(path, text)


def load(path: str | Path) -> ConflictMap:
    """See `ConflictMap.load`."""
    return _Reader(path).read()


def parse_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        MapFileError: it is missing, cannot be read, or is truncated.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MapFileError(f"{path}: there is no such file. Give the path of an existing one.") from None
    except OSError as error:
        raise MapFileError(f"{path}: cannot be read ({error.strerror}). Give the path of another one.") from error
    except ValueError as error:
        raise MapFileError(
            f"{path}: not whole JSON ({error}); the file may be truncated. Make it again, or take another."
        ) from error


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
    }


def _values(counts: Counts | None) -> list[Any] | None:
    return None if counts is None else counts.tolist()


class _Reader:
    """Reads a map file and checks every field, naming the file and the field in each complaint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def fail(self, what: str) -> MapFileError:
        return MapFileError(f"{self.path}: {what}. Make a new map with `recon profile`.")

    def read(self) -> ConflictMap:
        document = parse_json(self.path)
        if not isinstance(document, dict):
            raise self.fail(f"holds a {type(document).__name__}, not one JSON object")
        if document.get("format") != FORMAT:
            hint = "; `recon map import` reads the published code's scores" if _looks_like_scores(document) else ""
            raise self.fail(f"field 'format' is {document.get('format')!r}, not {FORMAT!r}: not a conflict map{hint}")
        if document.get("version") != VERSION:
            raise self.fail(f"field 'version' is {document.get('version')!r}, but this recon reads version {VERSION}")
        tasks = self._get(document, "tasks", list)
        if len(tasks) == 1 or len(set(map(str, tasks))) < len(tasks) or not all(isinstance(t, str) for t in tasks):
            raise self.fail(f"field 'tasks' is {tasks!r}, not a list of two or more different names (or none, unknown)")
        layers = self._get(document, "layers", list)
        if not layers:
            raise self.fail("field 'layers' is empty")
        for key, entries, most in (("tasks", tasks, MOST_TASKS), ("layers", layers, MOST_LAYERS)):
            if len(entries) > most:
                raise self.fail(f"field {key!r} has {len(entries)} entries; recon reads maps of at most {most}")
        cmap = ConflictMap(
            tasks=tuple(tasks),
            threshold=self._threshold(document),
            steps=self._count_or_none(document, "steps"),
            skipped=self._count_or_none(document, "skipped_non_finite"),
            stage_steps=self._stage_steps(document),
            layers=[self._layer(entry, number, len(tasks)) for number, entry in enumerate(layers)],
            made_by=self._get(document, "made_by", dict),
            bin_steps=self._count_or_none(document, "bin_steps", int),
        )
        check(cmap, self.fail)
        return cmap

    def _get(self, entry: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
        label = f"{where}{key}"
        if not isinstance(entry, dict) or key not in entry:
            raise self.fail(f"field {label!r} is missing")
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"field {label!r} has the wrong type ({type(value).__name__})")
        return value

    def _threshold(self, document: dict[str, Any]) -> float:
        value = self._get(document, "threshold", (int, float))
        if not -1 < value <= 0:  # also of an integer that no float holds
            raise self.fail(f"field 'threshold' is {value}, not a multiple of 0.01 in (-1, 0], such as -0.1")
        return float(value)

    def _count_or_none(
        self, entry: Any, key: str, kind: type | tuple[type, ...] = _INT_OR_NONE, where: str = ""
    ) -> Any:
        count = self._get(entry, key, kind, where)
        if count is not None and not 0 <= count <= MOST_STEPS:
            raise self.fail(f"field '{where}{key}' is {count}, not a count from 0 to {MOST_STEPS}")
        return count

    def _stage_steps(self, document: dict[str, Any]) -> tuple[int, ...]:
        unknown = self._get(document, "stage_steps", list) == []
        return () if unknown else tuple(self._counts(document, "stage_steps", (STAGES,)).tolist())

    def _counts(self, entry: Any, key: str, shape: Sequence[int], where: str = "") -> Counts:
        value = self._get(entry, key, list, where)
        try:
            array = np.array(value)
        except ValueError:
            array = np.array(None)
        whole = array.dtype.kind == "i" and array.shape == tuple(shape)
        if not whole or not ((array >= 0) & (array <= _MOST)).all():
            raise self.fail(f"field '{where}{key}' is not an array of counts of shape {tuple(shape)}")
        return array.astype(np.int64)

    def _counts_or_none(self, entry: Any, key: str, shape: Sequence[int], where: str) -> Counts | None:
        unknown = self._get(entry, key, (list, type(None)), where) is None
        return None if unknown else self._counts(entry, key, shape, where)

    def _layer(self, entry: Any, number: int, tasks: int) -> LayerConflicts:
        where = f"layers[{number}]."
        shapes = self._get(entry, "shapes", dict, where)
        if not all(isinstance(shape, list) and all(type(side) is int for side in shape) for shape in shapes.values()):
            raise self.fail(f"field '{where}shapes' is not a table of shapes")
        check_shapes(shapes, self._get(entry, "parameters", _INT_OR_NONE, where), where, self.fail)
        pairs = tasks * (tasks - 1) // 2
        series = self._get(entry, "series", (list, type(None)), where)
        return LayerConflicts(
            name=self._get(entry, "name", str, where),
            kind=self._get(entry, "type", str, where),
            shapes=shapes,
            histogram=self._counts_or_none(entry, "histogram", (BINS,), where),
            conflicts=self._counts_or_none(entry, "conflicts", (STAGES, pairs), where),
            observed=self._counts_or_none(entry, "observed", (STAGES, pairs), where),
            series=None if series is None else self._counts(entry, "series", (len(series),), where),
            score=self._count_or_none(entry, "score", where=where),
        )


def _looks_like_scores(document: dict[str, Any]) -> bool:
    return bool(document) and all(type(value) is int for value in document.values())
