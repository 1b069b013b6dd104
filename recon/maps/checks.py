"""Check that the numbers of a conflict map agree with each other: if not, the file is damaged or made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

from recon.errors import UsageError
from recon.maps.counts import SERIES, LayerConflicts
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
    for key in ("histogram", "conflicts", "observed"):
        if (getattr(layer, key) is None) != (getattr(cmap.layers[0], key) is None):
            fail(f"field '{where}{key}' is known here and not in layers[0], or the other way round")
    if (layer.conflicts is None) != (layer.observed is None):
        fail(f"field '{where}conflicts' goes with 'observed': both are known, or neither")
    if layer.histogram is None and layer.score is None:
        fail(f"field '{where}score' is missing, and there is no histogram to take it from")
    if layer.histogram is None and (layer.conflicts is not None or layer.series is not None):
        fail(f"field '{where}histogram' is missing, though the counts made with it are there")


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
