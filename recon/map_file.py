"""The conflict map file: one JSON object, written atomically, every field checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recon.conflict_map import BINS, SERIES, STAGES, ConflictMap, Counts, LayerConflicts
from recon.errors import MapFileError, UsageError
from recon.files import write_text

FORMAT = "recon conflict map"
VERSION = 2


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
        cmap = ConflictMap(
            tasks=tuple(tasks),
            threshold=float(self._get(document, "threshold", (int, float))),
            steps=self._get(document, "steps", (int, type(None))),
            skipped=self._get(document, "skipped_non_finite", (int, type(None))),
            stage_steps=self._stage_steps(document),
            layers=[self._layer(entry, number, len(tasks)) for number, entry in enumerate(layers)],
            made_by=self._get(document, "made_by", dict),
            bin_steps=self._get(document, "bin_steps", int),
        )
        for key, count in (("steps", cmap.steps), ("skipped_non_finite", cmap.skipped), ("bin_steps", cmap.bin_steps)):
            if count is not None and count < 0:
                raise self.fail(f"field {key!r} is {count}, but counts something")
        self._check(cmap)
        return cmap

    def _get(self, entry: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
        label = f"{where}{key}"
        if not isinstance(entry, dict) or key not in entry:
            raise self.fail(f"field {label!r} is missing")
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"field {label!r} has the wrong type ({type(value).__name__})")
        return value

    def _stage_steps(self, document: dict[str, Any]) -> tuple[int, ...]:
        unknown = self._get(document, "stage_steps", list) == []
        return () if unknown else tuple(self._counts(document, "stage_steps", (STAGES,)).tolist())

    def _counts(self, entry: Any, key: str, shape: Sequence[int], where: str = "") -> Counts:
        value = self._get(entry, key, list, where)
        try:
            array = np.array(value)
        except ValueError:
            array = np.array(None)
        if array.dtype.kind != "i" or array.shape != tuple(shape) or (array < 0).any():
            raise self.fail(f"field '{where}{key}' is not an array of counts of shape {tuple(shape)}")
        return array.astype(np.int64)

    def _counts_or_none(self, entry: Any, key: str, shape: Sequence[int], where: str) -> Counts | None:
        unknown = self._get(entry, key, (list, type(None)), where) is None
        return None if unknown else self._counts(entry, key, shape, where)

    def _layer(self, entry: Any, number: int, tasks: int) -> LayerConflicts:
        where = f"layers[{number}]."
        shapes = self._get(entry, "shapes", dict, where)
        if not all(isinstance(s, list) and all(isinstance(n, int) for n in s) for s in shapes.values()):
            raise self.fail(f"field '{where}shapes' is not a table of shapes")
        pairs = tasks * (tasks - 1) // 2
        series = self._get(entry, "series", (list, type(None)), where)
        score = self._get(entry, "score", (int, type(None)), where)
        if score is not None and score < 0:
            raise self.fail(f"field '{where}score' is {score}, not a count")
        return LayerConflicts(
            name=self._get(entry, "name", str, where),
            kind=self._get(entry, "type", str, where),
            shapes=shapes,
            histogram=self._counts_or_none(entry, "histogram", (BINS,), where),
            conflicts=self._counts_or_none(entry, "conflicts", (STAGES, pairs), where),
            observed=self._counts_or_none(entry, "observed", (STAGES, pairs), where),
            series=None if series is None else self._counts(entry, "series", (len(series),), where),
            score=score,
        )

    def _check(self, cmap: ConflictMap) -> None:
        """What the fields say must agree, within each layer and between them."""
        if len({layer.name for layer in cmap.layers}) < len(cmap.layers):
            raise self.fail("field 'layers' names a layer twice")
        for number, layer in enumerate(cmap.layers):
            self._check_unknown(cmap, layer, f"layers[{number}].")
        try:
            scores = cmap.scores()
        except UsageError as error:
            raise self.fail(f"field 'threshold': {error}") from None
        for number, layer in enumerate(cmap.layers):
            self._check_sums(layer, scores[layer.name], f"layers[{number}].")
        self._check_series(cmap)

    def _check_unknown(self, cmap: ConflictMap, layer: LayerConflicts, where: str) -> None:
        """Counts are known for all layers or for none; the score stands in for them, and only then."""
        for key in ("histogram", "conflicts", "observed"):
            if (getattr(layer, key) is None) != (getattr(cmap.layers[0], key) is None):
                raise self.fail(f"field '{where}{key}' is known here and not in layers[0], or the other way round")
        if (layer.conflicts is None) != (layer.observed is None):
            raise self.fail(f"field '{where}conflicts' goes with 'observed': both are known, or neither")
        if layer.histogram is None and layer.score is None:
            raise self.fail(f"field '{where}score' is missing, and there is no histogram to take it from")
        if layer.histogram is None and (layer.conflicts is not None or layer.series is not None):
            raise self.fail(f"field '{where}histogram' is missing, though the counts made with it are there")

    def _check_sums(self, layer: LayerConflicts, score: int, where: str) -> None:
        if layer.score not in (None, score):
            raise self.fail(f"field '{where}score' is {layer.score}, but its histogram says {score}")
        if layer.histogram is None or layer.conflicts is None or layer.observed is None:
            return
        if layer.histogram.sum() != layer.observed.sum() or score != layer.conflicts.sum():
            raise self.fail(f"field '{where}histogram' does not add up to its counts")

    def _check_series(self, cmap: ConflictMap) -> None:
        series = [layer.series for layer in cmap.layers]
        lengths = {-1 if values is None else len(values) for values in series}
        if len(lengths) > 1:
            raise self.fail("field 'series' has not the same length in all layers")
        if cmap.bin_steps < 0 or (cmap.bin_steps > 0) != (lengths not in (set(), {-1})):
            raise self.fail(f"field 'bin_steps' is {cmap.bin_steps}: above 0 with series in the layers, 0 without")
        if max(lengths, default=0) > SERIES or 0 in lengths:
            raise self.fail(f"field 'series' has {max(lengths)} bins, not 1 to {SERIES}")
        scores = cmap.scores()
        for number, layer in enumerate(cmap.layers):
            if layer.series is not None and layer.series.sum() != scores[layer.name]:
                raise self.fail(f"field 'layers[{number}].series' does not add up to the score")


def _looks_like_scores(document: dict[str, Any]) -> bool:
    return bool(document) and all(type(value) is int for value in document.values())
