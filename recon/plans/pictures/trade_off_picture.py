"""The trade-off between plans as a picture: conflict covered against parameters and against multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from recon.support.pictures import save_picture

if TYPE_CHECKING:
    from recon.plans.trade_off import Point

Cost = Callable[["Point"], float]

_RANKING, _BUDGET, _CHOSEN, _MOST = "#4c7fb8", "#d07a12", "#b5367a", "#dfe3e8"
_WIDE = 4.0  # costs that differ by more than this factor are drawn on a logarithmic scale
_OFFSETS = ((7, -7), (-7, 7), (7, 7), (-7, -7))  # of a label from its mark, in points: tried in this order


def draw_frontier(points: Sequence[Point], path: str | Path) -> None:
    """Draw every plan of a frontier twice, as a PNG: against its parameters and against its multiply-adds.

    The broad line shows the most that any of the plans covers for so much of one cost. Plans that are not optimal in
    both costs together (see `recon.plans.trade_off.Point.optimal`) are hollow.
    """
    save_picture(frontier_figure(points), path)


def frontier_figure(points: Sequence[Point]) -> Figure:
    """What `draw_frontier` saves."""
    figure = Figure(figsize=(7.7, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    costs: tuple[Cost, Cost] = (lambda point: point.parameters_ratio), (lambda point: point.macs_ratio)
    for axes, cost, what in zip(panels, costs, ("parameters", "multiply-adds"), strict=True):
        _mark(axes, points, cost)
        axes.set_xlabel(f"{what}, ratio to the unbranched network", fontsize=8.5)
        _scale(axes, [cost(point) for point in points])
    panels[0].set_ylabel("% of the conflicts covered", fontsize=8.5)
    panels[0].set_ylim(-4, 106)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5, columnspacing=1.3, frameon=False
    )
    figure.draw_without_rendering()  # settles where things are, which the labels must know
    for axes, cost, budget in zip(panels, costs, ("max_params", "max_macs"), strict=True):
        _name(axes, points, cost, budget)
    return figure


def _mark(axes: Axes, points: Sequence[Point], cost: Cost) -> None:
    by_cost = sorted(points, key=cost)
    most = accumulate((100 * point.covered for point in by_cost), max)
    steps = [1.0, *map(cost, by_cost)], [0.0, *most]
    axes.step(*steps, where="post", color=_MOST, linewidth=6, zorder=1, label="most covered")
    axes.plot(*_places(_of("top_k", points), cost), color=_RANKING, linewidth=0.7, zorder=2)
    for selector, marker, size, colour, label in (
        ("top_k", "o", 16, _RANKING, "first K layers"),
        ("max_params", "s", 22, _BUDGET, "a limit on parameters"),
        ("max_macs", "D", 24, _BUDGET, "a limit on multiply-adds"),
    ):
        kind = _of(selector, points)
        if not kind:
            continue
        faces = [colour if point.optimal else "white" for point in kind]
        marks = axes.scatter(*_places(kind, cost), s=size, c=faces, edgecolors=colour, marker=marker, zorder=3)
        marks.set(linewidth=0.9, gid=label)
        axes.scatter([], [], s=size, c=colour, marker=marker, label=label)
    axes.scatter([], [], s=16, facecolor="white", edgecolor="#555555", label="not optimal")
    chosen = [point for point in points if point.chosen]
    if chosen:
        axes.scatter(*_places(chosen, cost), s=170, c=_CHOSEN, marker="*", edgecolors="white", zorder=4, label="chosen")


def _scale(axes: Axes, ratios: Sequence[float]) -> None:
    if max(ratios) > _WIDE:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.6g}x")
    axes.tick_params(labelsize=8)
    axes.grid(color="#eef0f3", linewidth=0.8)
    axes.set_axisbelow(True)


def _name(axes: Axes, points: Sequence[Point], cost: Cost, budget: str) -> None:
    """Name as many plans as there is room for: the chosen one, then this cost's budgets, then some K."""
    taken = [_box(axes, place, 0, 0, 6, 6) for place in zip(*_places(points, cost), strict=True)]
    named = [point for point in points if point.chosen] + _of(budget, points)
    named += [point for point in _of("top_k", points) if len(point.layers) == 1 or len(point.layers) % 5 == 0]
    for number, point in enumerate(named):
        if point not in named[:number]:
            _label(axes, point, cost, taken)


def _label(axes: Axes, point: Point, cost: Cost, taken: list[Bbox]) -> None:
    """Name a plan where there is room beside its mark; the chosen one wherever it stays within the plot."""
    text, size = _text(point), 8.0 if point.chosen else 6.5
    place, width = (cost(point), 100 * point.covered), 0.62 * size * len(text)
    boxes = {
        (right, up): _box(axes, place, right + (width if right > 0 else -width) / 2, up, width, size)
        for right, up in _OFFSETS
    }
    inside = [offset for offset, box in boxes.items() if _inside(box, axes.bbox)]
    free = [offset for offset in inside if not any(boxes[offset].overlaps(other) for other in taken)]
    offset = next(iter([*free, *(inside if point.chosen else [])]), None)
    if offset is None:
        return
    taken.append(boxes[offset])
    axes.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right",
        va="center",
        fontsize=size,
        color=_CHOSEN if point.chosen else _BUDGET if point.budgeted else _RANKING,
        weight="bold" if point.chosen else "normal",
        gid="name",
    )


def _text(point: Point) -> str:
    if point.chosen:
        return point.selector.replace("top_k=", "K=")
    return point.selector.replace("top_k=", "").replace("max_params=", "≤").replace("max_macs=", "≤")


def _of(selector: str, points: Iterable[Point]) -> list[Point]:
    return [point for point in points if point.selector.startswith(f"{selector}=")]


def _places(points: Iterable[Point], cost: Cost) -> tuple[list[float], list[float]]:
    points = list(points)
    return [cost(point) for point in points], [100 * point.covered for point in points]


def _box(axes: Axes, place: tuple[float, float], right: float, up: float, width: float, height: float) -> Bbox:
    """In pixels: what lies around a place of the plot; offset and size are in points."""
    pixels = axes.figure.dpi / 72
    x, y = axes.transData.transform(place)
    return Bbox.from_bounds(
        x + (right - width / 2) * pixels, y + (up - height / 2) * pixels, width * pixels, height * pixels
    )


def _inside(box: Bbox, around: Bbox) -> bool:
    around = around.padded(-4)
    return around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0 and box.y1 <= around.y1
