"""Check that the numbers of a conflict map agree with each other: if not, the file is damaged or made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from recon.errors import UsageError
from recon.maps.counts import PAIR_SERIES, SERIES, Counts, LayerConflicts, LayerFloor, threshold_bin
from recon.maps.score_table import ScoreTable
from recon.support.files.documents import Document

MOST_LAYERS, MOST_TASKS = 20_000, 1_000
MOST_STEPS = 10**12  # and the longest side of a parameter; products of counts stay far within int64
MOST_PARAMETERS = 10**15

Fail = Callable[[str], NoReturn]


def check(cmap: ScoreTable, fail: Fail) -> None:
    """Fail unless the fields agree, within each layer and between them; each has its type and shape already."""
    if len({layer.name for layer in cmap.layers}) < len(cmap.layers):
        fail("field 'layers' names a layer twice")
    for number, layer in enumerate(cmap.layers):
        _check_known(cmap, layer, f"layers[{number}].", fail)
    try:
        scores = cmap.scores()
    except UsageError as error:
        fail(f"field 'threshold': {str(error).rstrip('.')}")
    _check_steps(cmap, fail)
    for number, layer in enumerate(cmap.layers):
        _check_sums(layer, scores[layer.name], f"layers[{number}].", fail)
        _check_bounds(cmap, layer, scores[layer.name], f"layers[{number}].", fail)
    _check_series(cmap, scores, fail)
    _check_thresholds(cmap, fail)
    for number, layer in enumerate(cmap.layers):
        _check_below(cmap, layer, f"layers[{number}].", fail)
        if layer.floor is not None:
            _check_floor(cmap, layer.floor, f"layers[{number}].floor.", fail)
    _check_pair_series(cmap, fail)


def check_shapes(shapes: dict[str, list[int]], parameters: int | None, layer: Document) -> None:
    """Refuse shapes that no parameters have, or that hold another number of parameters than the file says."""
    sides = [side for shape in shapes.values() for side in shape]
    total = sum(math.prod(shape) for shape in shapes.values()) if len(sides) <= 1000 else math.inf
    if any(not 0 <= side <= MOST_STEPS for side in sides) or total > MOST_PARAMETERS:
        layer.wrong("shapes", "has shapes that no parameters have")
    if parameters != (total if shapes else None):
        layer.wrong("parameters", f"is {parameters}, but the shapes say {total if shapes else None}")


def _check_known(cmap: ScoreTable, layer: LayerConflicts, where: str, fail: Fail) -> None:
    """Counts are known for all layers or for none; the score stands in for them, and only then."""
    for key in ("histogram", "conflicts", "observed", "below", "pair_series"):
        if (getattr(layer, key) is None) != (getattr(cmap.layers[0], key) is None):
            fail(f"field '{where}{key}' is known here and not in layers[0], or the other way round")
    if (layer.conflicts is None) != (layer.observed is None):
        fail(f"field '{where}conflicts' goes with 'observed': both are known, or neither")
    if layer.histogram is None and layer.score is None:
        fail(f"field '{where}score' is missing, and there is no histogram to take it from")
    if layer.histogram is None and (layer.conflicts is not None or layer.series is not None):
        fail(f"field '{where}histogram' is missing, though the counts made with it are there")
    if layer.conflicts is None and any(of is not None for of in (layer.below, layer.pair_series, layer.floor)):
        fail(f"field '{where}conflicts' is missing, though other counts by task pair are there")


def _check_steps(cmap: ScoreTable, fail: Fail) -> None:
    if cmap.steps is None:
        return
    if (cmap.skipped or 0) > cmap.steps:
        fail(f"field 'skipped_non_finite' is {cmap.skipped}, above the {cmap.steps} steps that there were")
    if cmap.stage_steps and sum(cmap.stage_steps) != cmap.steps:
        fail(f"field 'stage_steps' adds up to {sum(cmap.stage_steps)}, not to the {cmap.steps} steps")


def _check_sums(layer: LayerConflicts, score: int, where: str, fail: Fail) -> None:
    if layer.score not in (None, score):
        fail(f"field '{where}score' is {layer.score}, but its histogram says {score}")
    if layer.histogram is None or layer.conflicts is None or layer.observed is None:
        return
    if layer.histogram.sum() != layer.observed.sum() or score != layer.conflicts.sum():
        fail(f"field '{where}histogram' does not add up to its counts")
    if (layer.conflicts > layer.observed).any():
        fail(f"field '{where}conflicts' counts more conflicts of a pair than cosines were observed of it")


def _check_bounds(cmap: ScoreTable, layer: LayerConflicts, score: int, where: str, fail: Fail) -> None:
    """A pair is observed at most once in a step."""
    if cmap.steps is None:
        return
    counted = cmap.steps - (cmap.skipped or 0)
    if layer.observed is not None:
        if (layer.observed.sum(axis=0) > counted).any():
            fail(f"field '{where}observed' counts a pair more often than in each of {counted} steps")
        if cmap.stage_steps and (layer.observed.max(axis=1, initial=0) > cmap.stage_steps).any():
            fail(f"field '{where}observed' counts a pair more often than its quarter has steps")
    elif cmap.tasks:
        seen, key = (score, "score") if layer.histogram is None else (int(layer.histogram.sum()), "histogram")
        if seen > counted * len(cmap.pairs):
            fail(f"field '{where}{key}' counts more than {counted} steps of {len(cmap.pairs)} pairs have")


def _check_series(cmap: ScoreTable, scores: dict[str, int], fail: Fail) -> None:
    series = [layer.series for layer in cmap.layers]
    lengths = {-1 if values is None else len(values) for values in series}
    if len(lengths) > 1:
        fail("field 'series' has not the same length in all layers")
    if (cmap.bin_steps > 0) != (lengths != {-1}):
        fail(f"field 'bin_steps' is {cmap.bin_steps}: above 0 with series in the layers, 0 without")
    bins = max(lengths)
    if bins > SERIES or bins == 0:
        fail(f"field 'series' has {bins} bins, not 1 to {SERIES}")
    if bins > 0 and cmap.steps is not None and bins != -(-cmap.steps // cmap.bin_steps):
        fail(f"field 'series' has {bins} bins of {cmap.bin_steps} steps, which does not fit {cmap.steps} steps")
    for number, layer in enumerate(cmap.layers):
        if layer.series is None:
            continue
        if layer.series.sum() != scores[layer.name]:
            fail(f"field 'layers[{number}].series' does not add up to the score")
        if cmap.tasks and (layer.series > cmap.bin_steps * len(cmap.pairs)).any():
            fail(f"field 'layers[{number}].series' counts more conflicts in a bin than it has steps and pairs")


def _check_thresholds(cmap: ScoreTable, fail: Fail) -> None:
    try:
        bins = [threshold_bin(threshold) for threshold in cmap.thresholds]
    except UsageError as error:
        fail(f"field 'thresholds': {str(error).rstrip('.')}")
    if bins != sorted(set(bins)):
        fail("field 'thresholds' is not in rising order")
    if bins and threshold_bin(cmap.threshold) not in bins:
        fail(f"field 'thresholds' lacks the map's own threshold, {cmap.threshold:g}")
    if not bins and any(layer.below is not None or layer.floor is not None for layer in cmap.layers):
        fail("field 'thresholds' is empty, though there are counts at thresholds")


def _check_below(cmap: ScoreTable, layer: LayerConflicts, where: str, fail: Fail) -> None:
    """A cosine below one threshold is below all higher ones; all pairs together are the histogram's."""
    if layer.below is None or layer.histogram is None or layer.conflicts is None or layer.observed is None:
        return
    _check_nested(layer.below, layer.observed.sum(axis=0), f"{where}below", fail)
    for threshold, counts in zip(cmap.thresholds, layer.below, strict=True):
        if counts.sum() != layer.histogram[: threshold_bin(threshold)].sum():
            fail(f"field '{where}below' does not add up to the histogram at S={threshold:g}")
        if threshold == cmap.threshold and (counts != layer.conflicts.sum(axis=0)).any():
            fail(f"field '{where}below' has other counts at the map's own threshold than 'conflicts'")


def _check_floor(cmap: ScoreTable, floor: LayerFloor, where: str, fail: Fail) -> None:
    _check_nested(floor.conflicts, floor.observed, f"{where}conflicts", fail)
    _check_nested(floor.across_conflicts, floor.across_observed, f"{where}across_conflicts", fail)


def _check_nested(below: Counts, observed: Counts, field: str, fail: Fail) -> None:
    if (np.diff(below, axis=0) < 0).any():
        fail(f"field '{field}' counts more cosines below a threshold than below a higher one")
    if (below > observed).any():
        fail(f"field '{field}' counts more cosines below a threshold than were observed")


def _check_pair_series(cmap: ScoreTable, fail: Fail) -> None:
    known = cmap.layers[0].pair_series is not None
    if known != (cmap.met is not None) or known != (cmap.pair_bin_steps > 0):
        fail("fields 'met' and 'pair_bin_steps' go with the layers' 'pair_series': all are known, or none")
    if cmap.met is None:
        return
    bins = len(cmap.met)
    if bins > SERIES or (bins > 1 and bins * len(cmap.pairs) * len(cmap.layers) > PAIR_SERIES):
        fail(f"field 'met' has {bins} bins, more than a map of this size has")
    if cmap.steps is not None and bins != -(-cmap.steps // cmap.pair_bin_steps):
        fail(f"field 'met' has {bins} bins of {cmap.pair_bin_steps} steps, which does not fit {cmap.steps} steps")
    if (cmap.met > cmap.pair_bin_steps).any():
        fail(f"field 'met' counts more than {cmap.pair_bin_steps} steps in a bin")
    for number, layer in enumerate(cmap.layers):
        if layer.pair_series is None or layer.conflicts is None or layer.observed is None:
            continue
        where = f"layers[{number}]."
        if layer.pair_series.shape != cmap.met.shape:
            fail(f"field '{where}pair_series' has {len(layer.pair_series)} bins, but 'met' has {bins}")
        if (layer.pair_series.sum(axis=0) != layer.conflicts.sum(axis=0)).any():
            fail(f"field '{where}pair_series' does not add up to the conflicts of each pair")
        if (layer.pair_series > cmap.met).any():
            fail(f"field '{where}pair_series' counts conflicts of a pair in steps in which it did not meet")
        if (layer.observed.sum(axis=0) > cmap.met.sum(axis=0)).any():
            fail(f"field '{where}observed' counts a pair in more steps than 'met' does")
