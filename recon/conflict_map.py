"""ConflictMap: how often the tasks' gradients conflicted in each shared layer, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import MapFileError, UsageError
from recon.files import write_text

FORMAT = "recon conflict map"
VERSION = 1
BINS = 200
STAGES = 4

Counts = NDArray[np.int64]


def bin_edges() -> NDArray[np.float64]:
    """The 0.01 grid over [-1, 1]: 201 edges, each the double nearest to its decimal."""
    return np.arange(-100, 101) / 100


def threshold_bin(threshold: float) -> int:
    """How many histogram bins lie below `threshold`.

    Raises:
        UsageError: the threshold is outside (-1, 0] or off the 0.01 grid.
    """
    if not -1 < threshold <= 0 or abs(threshold * 100 - round(threshold * 100)) > 1e-6:
        raise UsageError(f"Threshold {threshold} is not a multiple of 0.01 in (-1, 0], such as -0.1.")
    return round(threshold * 100) + 100


@dataclass
class LayerConflicts:
    """What was counted in one shared layer.

    Args:
        name: the layer's name.
        kind: its class name.
        shapes: the shape of each of its parameters.
        histogram: (200,) cosines on the 0.01 grid over [-1, 1], summed over steps and task pairs; bin i holds
            cosines in [-1 + 0.01 i, -1 + 0.01 (i + 1)), the last one 1 as well.
        conflicts: (4, pairs) cosines below the map's threshold, by quarter of the training.
        observed: (4, pairs) cosines seen, by quarter of the training.
    """

    name: str
    kind: str
    shapes: dict[str, list[int]]
    histogram: Counts
    conflicts: Counts
    observed: Counts

    @property
    def size(self) -> int:
        """The number of scalars in the layer's parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


@dataclass
class ConflictMap:
    """The S-conflict scores of every shared layer (Shi et al. 2023, definition 4), at every threshold.

    Args:
        tasks: the tasks whose gradients were compared.
        threshold: the run's own S in (-1, 0]: `conflicts` are counted at it.
        steps: how many training steps were profiled.
        skipped: how many steps were left out because a gradient was not finite.
        stage_steps: the number of steps in each quarter of the training.
        layers: the shared layers, in model order.
        made_by: how the map was made (problem, optimizer, seed, versions, seconds...).
    """

    tasks: tuple[str, ...]
    threshold: float
    steps: int
    skipped: int
    stage_steps: tuple[int, ...]
    layers: list[LayerConflicts]
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The task pairs, in the order of the `pairs` axis of the counts."""
        return list(combinations(self.tasks, 2))

    def scores(self, threshold: float | None = None) -> dict[str, int]:
        """`{layer name: S-conflict score}`: how many (step, pair) had a cosine below `threshold`, strictly.

        Args:
            threshold: S, a multiple of 0.01 in (-1, 0]; the map's own when not given.

        Raises:
            UsageError: the threshold is off the grid.
        """
        below = threshold_bin(self.threshold if threshold is None else threshold)
        return {layer.name: int(layer.histogram[:below].sum()) for layer in self.layers}

    def shares(self, threshold: float | None = None) -> dict[str, float]:
        """`{layer name: score as a share of all the (step, pair) seen there}`, in [0, 1]."""
        scores = self.scores(threshold)
        return {
            layer.name: scores[layer.name] / seen if (seen := int(layer.histogram.sum())) else 0.0
            for layer in self.layers
        }

    def ranking(self, threshold: float | None = None) -> list[str]:
        """The layer names, highest score first, ties by model order."""
        scores = self.scores(threshold)
        return sorted(scores, key=lambda name: -scores[name])

    def stage_shares(self) -> NDArray[np.float64]:
        """(layers, 4): the share of conflicts at the map's own threshold in each quarter; NaN where none was seen."""
        conflicts = np.array([layer.conflicts.sum(axis=1) for layer in self.layers], dtype=float)
        observed = np.array([layer.observed.sum(axis=1) for layer in self.layers], dtype=float)
        return np.divide(conflicts, observed, out=np.full_like(conflicts, np.nan), where=observed > 0)

    def save(self, path: str | Path) -> None:
        """Write the map as one JSON object, a line a layer, atomically.

        Raises:
            UsageError: the path cannot be written.
        """
        head = {
            "format": FORMAT,
            "version": VERSION,
            "tasks": list(self.tasks),
            "threshold": self.threshold,
            "steps": self.steps,
            "skipped_non_finite": self.skipped,
            "stage_steps": list(self.stage_steps),
            "made_by": self.made_by,
        }
        lines = [json.dumps(_layer_to_json(layer)) for layer in self.layers]
        text = json.dumps(head, indent=1)[:-2] + ',\n "layers": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: str | Path) -> ConflictMap:
        """Read a map that `save` wrote.

        Raises:
            MapFileError: missing, truncated, of an unknown version, or with a wrong field.
        """
        return _Reader(path).read()


def _layer_to_json(layer: LayerConflicts) -> dict[str, Any]:
    return {
        "name": layer.name,
        "type": layer.kind,
        "shapes": layer.shapes,
        "parameters": layer.size,
        "histogram": layer.histogram.tolist(),
        "conflicts": layer.conflicts.tolist(),
        "observed": layer.observed.tolist(),
    }


class _Reader:
    """Reads a map file and checks every field, naming the file and the field in each complaint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def fail(self, what: str) -> MapFileError:
        return MapFileError(f"{self.path}: {what}. Make a new map with `recon profile`.")

    def read(self) -> ConflictMap:
        document = self._parse()
        if document.get("format") != FORMAT:
            raise self.fail(f"field 'format' is {document.get('format')!r}, not {FORMAT!r}: not a conflict map")
        if document.get("version") != VERSION:
            raise self.fail(f"field 'version' is {document.get('version')!r}, but this recon reads version {VERSION}")
        tasks = self._get(document, "tasks", list)
        if len(tasks) < 2 or len(set(map(str, tasks))) < len(tasks) or not all(isinstance(t, str) for t in tasks):
            raise self.fail(f"field 'tasks' is {tasks!r}, not a list of two or more different names")
        stage_steps = self._get(document, "stage_steps", list)
        layers = self._get(document, "layers", list)
        pairs = len(tasks) * (len(tasks) - 1) // 2
        cmap = ConflictMap(
            tasks=tuple(tasks),
            threshold=float(self._get(document, "threshold", (int, float))),
            steps=self._get(document, "steps", int),
            skipped=self._get(document, "skipped_non_finite", int),
            stage_steps=tuple(self._counts({"stage_steps": stage_steps}, "stage_steps", (STAGES,)).tolist()),
            layers=[self._layer(entry, number, pairs) for number, entry in enumerate(layers)],
            made_by=self._get(document, "made_by", dict),
        )
        self._check(cmap)
        return cmap

    def _parse(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self.fail("there is no such file") from None
        except OSError as error:
            raise self.fail(f"cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise self.fail(f"not whole JSON ({error}); the file may be truncated") from error
        if not isinstance(document, dict):
            raise self.fail(f"holds a {type(document).__name__}, not one JSON object")
        return document

    def _get(self, entry: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
        label = f"{where}{key}"
        if not isinstance(entry, dict) or key not in entry:
            raise self.fail(f"field {label!r} is missing")
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"field {label!r} has the wrong type ({type(value).__name__})")
        return value

    def _counts(self, entry: Any, key: str, shape: Sequence[int], where: str = "") -> Counts:
        value = self._get(entry, key, list, where)
        try:
            array = np.array(value)
        except ValueError:
            array = np.array(None)
        if array.dtype.kind != "i" or array.shape != tuple(shape) or (array < 0).any():
            raise self.fail(f"field '{where}{key}' is not an array of counts of shape {tuple(shape)}")
        return array.astype(np.int64)

    def _layer(self, entry: Any, number: int, pairs: int) -> LayerConflicts:
        where = f"layers[{number}]."
        shapes = self._get(entry, "shapes", dict, where)
        if not all(isinstance(s, list) and all(isinstance(n, int) for n in s) for s in shapes.values()):
            raise self.fail(f"field '{where}shapes' is not a table of shapes")
        return LayerConflicts(
            name=self._get(entry, "name", str, where),
            kind=self._get(entry, "type", str, where),
            shapes=shapes,
            histogram=self._counts(entry, "histogram", (BINS,), where),
            conflicts=self._counts(entry, "conflicts", (STAGES, pairs), where),
            observed=self._counts(entry, "observed", (STAGES, pairs), where),
        )

    def _check(self, cmap: ConflictMap) -> None:
        try:
            scores = cmap.scores()
        except UsageError as error:
            raise self.fail(f"field 'threshold': {error}") from None
        if len(scores) < len(cmap.layers):
            raise self.fail("field 'layers' names a layer twice")
        for number, layer in enumerate(cmap.layers):
            if layer.histogram.sum() != layer.observed.sum() or scores[layer.name] != layer.conflicts.sum():
                raise self.fail(f"field 'layers[{number}].histogram' does not add up to its counts")
