"""ScoreTable: what was counted in each shared layer, and everything that is computed from the counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recon.errors import UsageError
from recon.maps.confidence import intervals, top_k_probability

BINS = 200
STAGES = 4
SERIES = 512  # at most this many bins of steps in a layer's series

Counts = NDArray[np.int64]


def bin_edges() -> NDArray[np.float64]:
    """The 0.01 grid over [-1, 1]: 201 edges, each the double nearest to its decimal."""
    return np.arange(-100, 101) / 100


def threshold_bin(threshold: float) -> int:
    """How many histogram bins lie below `threshold`."""
    if not -1 < threshold <= 0 or abs(threshold * 100 - round(threshold * 100)) > 1e-6:
        raise UsageError(f"Threshold {threshold} is not a multiple of 0.01 in (-1, 0], such as -0.1.")
    return round(threshold * 100) + 100


@dataclass
class LayerConflicts:
    """What was counted in one shared layer; a field that an imported file does not give is empty or None.

    Args:
        name: the layer's name.
        kind: its class name.
        shapes: the shape of each of its parameters.
        histogram: (200,) cosines on the 0.01 grid over [-1, 1], summed over steps and task pairs; bin i holds
            cosines in [-1 + 0.01 i, -1 + 0.01 (i + 1)), the last one 1 as well.
        conflicts: (4, pairs) cosines below the map's threshold, by quarter of the training.
        observed: (4, pairs) cosines seen, by quarter of the training.
        series: (B,) cosines below the map's threshold, summed over task pairs, by bin of the map's `bin_steps`
            consecutive steps, B at most 512; the last bin may be shorter.
        score: the S-conflict score at the map's threshold, of a layer without a histogram.
    """

    name: str
    kind: str
    shapes: dict[str, list[int]]
    histogram: Counts | None
    conflicts: Counts | None
    observed: Counts | None
    series: Counts | None = None
    score: int | None = None

    @property
    def size(self) -> int | None:
        """The number of scalars in the layer's parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) if self.shapes else None


@dataclass(repr=False)
class ScoreTable:
    """The S-conflict scores of every shared layer (Shi et al. 2023, definition 4), at every threshold.

    Args:
        tasks: the tasks whose gradients were compared; empty if an imported file did not name them.
        threshold: the run's own S in (-1, 0]: `conflicts` are counted at it.
        steps: how many training steps were profiled; None if unknown.
        skipped: how many steps were left out because a gradient was not finite; None if unknown.
        stage_steps: the number of steps in each quarter of the training; empty if unknown.
        layers: the shared layers, in model order. An imported map has its file's order; applied to a model, it gets
            the model's.
        made_by: how the map was made (problem, optimizer, seed, versions, seconds...).
        bin_steps: how many steps an entry of the layers' series covers; 0 without series.
    """

    tasks: tuple[str, ...]
    threshold: float
    steps: int | None
    skipped: int | None
    stage_steps: tuple[int, ...]
    layers: list[LayerConflicts]
    made_by: dict[str, Any] = field(default_factory=dict)
    bin_steps: int = 0

    def __repr__(self) -> str:
        steps = "?" if self.steps is None else self.steps
        first = ", ".join(self.ranking()[:3])
        return (
            f"{type(self).__name__}({len(self.tasks)} tasks, {len(self.layers)} shared layers, {steps} steps, "
            f"S={self.threshold:g}; first: {first})"
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The task pairs, in the order of the `pairs` axis of the counts."""
        return list(combinations(self.tasks, 2))

    @property
    def unfinished(self) -> str:
        """The warning for a map of an unfinished profile; empty for a finished one."""
        if self.made_by.get("finished", True):
            return ""
        made = self.made_by
        return (
            f"The profile was interrupted in epoch {made.get('epoch')} of {made.get('epochs')}: its map holds what was "
            "counted until then. Go on with --resume (in Python, resume=True)."
        )

    def scores(self, threshold: float | None = None) -> dict[str, int]:
        """`{layer name: S-conflict score}`: how many (step, pair) had a cosine below `threshold`, strictly.

        The threshold S is a multiple of 0.01 in (-1, 0]; the map's own when not given.
        """
        below = threshold_bin(self.threshold if threshold is None else threshold)
        return {layer.name: self._score(layer, below) for layer in self.layers}

    def _score(self, layer: LayerConflicts, below: int) -> int:
        if layer.histogram is not None:
            return int(layer.histogram[:below].sum())
        if below != threshold_bin(self.threshold) or layer.score is None:
            raise UsageError(
                f"This map holds only its scores at S={self.threshold:g}, not the cosines to score it at another "
                "threshold. Leave the threshold out, or make a map with recon, which can be scored at any."
            )
        return layer.score

    def shares(self, threshold: float | None = None) -> dict[str, float]:
        """`{layer name: score as a share of all the (step, pair) seen there}`, in [0, 1]; NaN where that is unknown."""
        return {
            layer.name: float("nan") if layer.histogram is None else score / max(1, int(layer.histogram.sum()))
            for layer, score in zip(self.layers, self.scores(threshold).values(), strict=True)
        }

    def ranking(self, threshold: float | None = None) -> list[str]:
        """The layer names, highest score first, ties by model order."""
        scores = self.scores(threshold)
        return sorted(scores, key=lambda name: -scores[name])

    def stage_shares(self) -> NDArray[np.float64]:
        """(layers, 4): the share of conflicts at the map's own threshold in each quarter; NaN where none was seen."""
        conflicts, observed = (
            np.array([np.zeros(STAGES) if counts is None else counts.sum(axis=1) for counts in column], dtype=float)
            for column in ([layer.conflicts for layer in self.layers], [layer.observed for layer in self.layers])
        )
        return np.divide(conflicts, observed, out=np.full_like(conflicts, np.nan), where=observed > 0)

    @property
    def has_series(self) -> bool:
        """Whether the map knows the scores over time, in enough bins to say how sure they are."""
        return all(layer.series is not None and len(layer.series) > 1 for layer in self.layers)

    def series(self) -> Counts:
        """(B, layers): cosines below the map's own threshold by bin of `bin_steps` consecutive steps.

        Raises:
            UsageError: the map does not hold them, because it is imported, merged or of one bin.
        """
        if not self.has_series:
            raise UsageError(
                "This map holds no scores over time, so nothing shows how sure its scores are: imported and "
                "merged maps hold none, nor does the map of a single step. Profile with recon, for two steps or more."
            )
        return np.stack([layer.series for layer in self.layers if layer.series is not None], axis=1)

    def intervals(self, level: float = 0.9) -> dict[str, tuple[int, int]]:
        """`{layer name: (low, high)}`: what holds a share `level` of resampled scores at the map's own threshold.

        From a block bootstrap over the steps, see `recon.maps.confidence`: it shows what other batches would have done
        to this training, not what another seed would.
        """
        low_high = intervals(self.series(), level).tolist()
        return {layer.name: (low, high) for layer, (low, high) in zip(self.layers, low_high, strict=True)}

    def top_k_probability(self, k: int) -> dict[str, float]:
        """`{layer name: how often it is among the k highest resampled scores}`; they add up to k. See `intervals`."""
        probabilities = top_k_probability(self.series(), k).tolist()
        return {layer.name: p for layer, p in zip(self.layers, probabilities, strict=True)}


Table = TypeVar("Table", bound=ScoreTable)
