"""Conflict maps counted from cosines by plain loops: what recon's own counting is held against."""

from itertools import combinations

import numpy as np

from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import LayerConflicts, LayerFloor

THRESHOLDS = (-0.3, -0.2, -0.15, -0.1, -0.05, 0.0)


def binned(values, width):
    return np.array([values[start : start + width].sum(axis=0) for start in range(0, len(values), width)])


def floor_of(own, across, thresholds=THRESHOLDS):
    """(steps, T) cosines of tasks with themselves, (steps, 2, pairs) of pairs both ways; NaN where not measured."""
    return LayerFloor(
        observed=np.isfinite(own).sum(axis=0),
        conflicts=np.array([(own < s).sum(axis=0) for s in thresholds]),
        across_observed=np.isfinite(across).sum(axis=(0, 1)),
        across_conflicts=np.array([(across < s).sum(axis=(0, 1)) for s in thresholds]),
    )


def map_of(cosines, tasks, threshold=-0.1, thresholds=THRESHOLDS, bin_steps=1, pair_bin_steps=1, floors=None):
    """Of `{layer: (steps, pairs) cosines}`, NaN where a pair did not meet, and `{layer: LayerFloor}`."""
    steps = len(next(iter(cosines.values())))
    quarters = np.array_split(np.arange(steps), 4)
    layers = [
        LayerConflicts(
            name,
            "Linear",
            {"weight": [2, 3]},
            np.histogram(values[np.isfinite(values)], np.arange(-100, 101) / 100)[0],
            np.array([(values[quarter] < threshold).sum(axis=0) for quarter in quarters]),
            np.array([np.isfinite(values[quarter]).sum(axis=0) for quarter in quarters]),
            series=binned((values < threshold).sum(axis=1), bin_steps),
            below=np.array([(values < s).sum(axis=0) for s in thresholds]),
            pair_series=binned(values < threshold, pair_bin_steps),
            floor=(floors or {}).get(name),
        )
        for name, values in cosines.items()
    ]
    met = np.max([binned(np.isfinite(values), pair_bin_steps) for values in cosines.values()], axis=0)
    return ConflictMap(
        tuple(tasks),
        threshold,
        steps,
        0,
        tuple(map(len, quarters)),
        layers,
        {"problem": "toy"},
        bin_steps=bin_steps,
        thresholds=tuple(thresholds),
        pair_bin_steps=pair_bin_steps,
        met=met,
    )


def random_cosines(names, tasks, steps, seed=0, missing=0.3):
    """Pairs meet in some of the steps, in all layers together; one pair never, another in the first four alone."""
    rng = np.random.default_rng(seed)
    pairs = len(list(combinations(tasks, 2)))
    met = rng.random((steps, pairs)) > missing
    if pairs > 2:
        met[:, 0] = False
        met[4:, 1] = False
    return {name: np.where(met, rng.uniform(-1, 1, (steps, pairs)), np.nan) for name in names}


def random_floors(names, tasks, steps, seed=1, thresholds=THRESHOLDS):
    rng = np.random.default_rng(seed)
    pairs = len(list(combinations(tasks, 2)))
    return {
        name: floor_of(rng.uniform(-0.4, 1, (steps, len(tasks))), rng.uniform(-1, 1, (steps, 2, pairs)), thresholds)
        for name in names
    }
