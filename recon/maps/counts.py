"""LayerConflicts: what was counted in one shared layer, and the grids that it was counted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recon.errors import UsageError

BINS = 200
STAGES = 4
SERIES = 512  # at most this many bins of steps in a layer's series
PAIR_SERIES = 2**20  # at most this many entries in all layers' series by pair: a file stays a few MB
_PAIR_BINS, _LEAST_PAIR_BINS = 64, 8

Counts = NDArray[np.int64]

_AROUND = (-20, -10, -5, 0, 5, 10)  # hundredths from S at which counts by pair are kept, and at 0


def bin_edges() -> NDArray[np.float64]:
    """The 0.01 grid over [-1, 1]: 201 edges, each the double nearest to its decimal."""
    return np.arange(-100, 101) / 100


def threshold_bin(threshold: float) -> int:
    """How many histogram bins lie below `threshold`."""
    if not -1 < threshold <= 0 or abs(threshold * 100 - round(threshold * 100)) > 1e-6:
        raise UsageError(f"Threshold {threshold} is not a multiple of 0.01 in (-1, 0], such as -0.1.")
    return round(threshold * 100) + 100


def thresholds_around(threshold: float) -> tuple[float, ...]:
    """The thresholds at which a profile at S counts by pair: S and some around it in (-1, 0], and 0; in order."""
    own = threshold_bin(threshold) - 100
    return tuple(hundredths / 100 for hundredths in sorted({own + d for d in _AROUND} | {0}) if -100 < hundredths <= 0)


def pair_bin_steps(steps: int, layers: int, pairs: int) -> int:
    """How many steps, a power of two, a bin of the series by pair covers: so many that all layers' fit into a file.

    0 where that leaves too few bins to say anything of noise: then there is none.
    """
    most = min(_PAIR_BINS, PAIR_SERIES // max(1, layers * pairs))
    if most < min(steps, _LEAST_PAIR_BINS):
        return 0
    return 1 << max(0, -(-steps // most) - 1).bit_length()


@dataclass
class LayerFloor:
    """How often gradients at the same weights conflict only because their batches differ: the noise of one layer.

    From the floor steps of a profile, which take the gradients g_i of one batch and g'_i of a second one.

    Args:
        observed: (T,) cosines cos(g_i, g'_i) of a task with itself that were seen.
        conflicts: (thresholds, T) of those, how many lay below each of the map's thresholds.
        across_observed: (pairs,) cosines seen of a pair across the two batches, cos(g_i, g'_j) and cos(g_j, g'_i): two
            a step.
        across_conflicts: (thresholds, pairs) of those, how many lay below.
    """

    observed: Counts
    conflicts: Counts
    across_observed: Counts
    across_conflicts: Counts


@dataclass
class LayerConflicts:
    """What was counted in one shared layer; a field that an imported or older file does not give is empty or None.

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
        below: (thresholds, pairs) cosines below each of the map's `thresholds`.
        pair_series: (bins, pairs) cosines below the map's threshold by bin of the map's `pair_bin_steps` steps.
        members: the names of the layers that a unit joins; empty for a layer of the model.
        floor: the noise floor, where one was taken.
    """

    name: str
    kind: str
    shapes: dict[str, list[int]]
    histogram: Counts | None
    conflicts: Counts | None
    observed: Counts | None
    series: Counts | None = None
    score: int | None = None
    below: Counts | None = None
    pair_series: Counts | None = None
    members: tuple[str, ...] = ()
    floor: LayerFloor | None = None

    @property
    def size(self) -> int | None:
        """The number of scalars in the layer's parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) if self.shapes else None
