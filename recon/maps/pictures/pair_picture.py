"""Who fights whom, as a picture: tasks x tasks, over all layers and in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recon.maps.pair_rates import PairRates, pair_rates
from recon.maps.score_table import ScoreTable
from recon.support.pictures import save_picture

_COLUMNS = 6
_UNKNOWN = "#d5d8dd"
_NAMED = 12  # tasks: more of them have no room for their names


def draw_pairs(
    cmap: ScoreTable,
    path: str | Path,
    layer: str | None = None,
    tasks: Sequence[str] | None = None,
    threshold: float | None = None,
) -> None:
    """Draw in how many of their steps each pair of tasks conflicted, as a PNG; over all layers and in each of them.

    With `layer`, in that one alone. Pairs that never met are grey. The diagonal holds the noise floor, where known.

    Raises:
        UnknownNameError, UsageError: as `recon.maps.pair_rates.pair_rates`.
    """
    save_picture(pairs_figure(cmap, layer, tasks, threshold), path)


def pairs_figure(
    cmap: ScoreTable,
    layer: str | None = None,
    tasks: Sequence[str] | None = None,
    threshold: float | None = None,
) -> Figure:
    """What `draw_pairs` saves."""
    each = [layer] if layer is not None else [of.name for of in cmap.layers]
    panels = [(name, pair_rates(cmap, [name], tasks, threshold)) for name in each]
    if layer is None:
        panels.insert(0, ("all layers", pair_rates(cmap, None, tasks, threshold)))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.8, 1.6 + 2.1 * columns), max(3.6, 1.2 + 1.9 * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (place, (title, found)) in enumerate(zip(axes, panels, strict=False)):
        image = place.imshow(_matrix(found), cmap="magma_r", vmin=0, vmax=100)
        for i, j in _never_met(found):
            place.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=_UNKNOWN, linewidth=0, gid="never met"))
        place.set_title(title, fontsize=8)
        _name(place, found.tasks, left=number % columns == 0, below=number // columns == rows - 1)
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    at = cmap.threshold if threshold is None else threshold
    figure.suptitle(f"Who fights whom: cos < {at:g} (grey: never met)", fontsize=9)
    figure.colorbar(image, ax=list(axes[:columns]), label="% of the steps in which\na pair met")
    return figure


def _matrix(found: PairRates) -> Any:
    """(T, T) per cent; NaN where unknown."""
    number = {task: i for i, task in enumerate(found.tasks)}
    values = np.full((len(number), len(number)), np.nan)
    for (a, b), rate in found.rates.items():
        values[number[a], number[b]] = values[number[b], number[a]] = 100 * rate
    for task, rate in found.own.items():
        values[number[task], number[task]] = 100 * rate
    return values


def _never_met(found: PairRates) -> list[tuple[int, int]]:
    """The cells of these pairs, on both sides of the diagonal."""
    number = {task: i for i, task in enumerate(found.tasks)}
    pairs = [(number[a], number[b]) for (a, b), steps in found.met.items() if not steps]
    return [*pairs, *((j, i) for i, j in pairs)]


def _name(axes: Any, tasks: Sequence[str], left: bool, below: bool) -> None:
    """The tasks' names beside the first panel of a row, and below the last one of a column."""
    axes.set_xticks([])
    axes.set_yticks([])
    if len(tasks) > _NAMED:
        axes.set_xlabel(f"{len(tasks)} tasks", fontsize=7)
        return
    if left:
        axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
    if below:
        axes.set_xticks(range(len(tasks)), tasks, fontsize=7, rotation=90)
