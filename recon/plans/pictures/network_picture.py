"""The branched network as a picture: its layers from top to bottom, the tasks from left to right."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve

from recon.branching.partition import Group
from recon.errors import cut
from recon.plans.pictures.network_layout import Lane, LayerRow, Layout, PictureStage, network_layout
from recon.support.pictures import save_picture
from recon.support.tables import short_number

if TYPE_CHECKING:
    from recon.branching import Partition
    from recon.plans.costing.cost_model import CostModel

# All in inches; the picture is 1000 pixels wide.
_WIDTH, _HEAD, _FOOT = 7.7, 1.0, 0.25
_STAGE, _LABEL = 1.22, 2.18  # where the names of stages and layers end
_LEFT, _RIGHT = 2.28, 5.75  # of the lanes
_BARS, _COUNT, _LARGEST = 5.95, 6.75, 0.7  # of the multiply-adds: where bars and numbers start, the longest bar
_ROW, _GAP, _FORK = 0.135, 0.09, 0.3

_ONCE, _ADDED, _INK = "#9aa0a8", "#111111", "#30343a"
_SIDE_BY_SIDE = 6  # groups whose tasks are listed below their lanes; more are named upright
_UPRIGHT = 40  # and more than this not at all
_LINES = 5  # of a list of tasks


def draw_network(
    cost_model: CostModel, layers: Mapping[str, Partition], path: str | Path, title: str, samples: int = 1
) -> None:
    """Draw the trunk, the branch points and the groups of a branched network, as a PNG.

    Every row is a layer, in model order. Where it runs once, for all tasks, its bar is grey; where values have fanned
    out, there is a bar for each group of tasks: in the group's full colour if the group has its own copy, pale if the
    copies' weights are shared. A bar is as wide as its group has tasks. On the right are the multiply-adds of each
    stage, divided by the number of samples in the cost model's example inputs.
    """
    save_picture(network_figure(cost_model, layers, title, samples), path)


def network_figure(cost_model: CostModel, layers: Mapping[str, Partition], title: str, samples: int = 1) -> Figure:
    """What `draw_network` saves."""
    layout = network_layout(cost_model, layers)
    costs = cost_model.of(layers)
    subtitle = (
        f"{len(layers)} of {len(cost_model.layers)} layers branched, {len(layout.order)} tasks in "
        f"{len(layout.groups)} groups: {costs.parameters_ratio:.2f}x the parameters, {costs.macs_ratio:.2f}x the "
        "multiply-adds"
    )
    return _Drawing(layout, samples).figure(title, subtitle)


class _Drawing:
    def __init__(self, layout: Layout, samples: int) -> None:
        self.layout, self.samples = layout, samples
        self.unit = (_RIGHT - _LEFT) / len(layout.order)
        self.left_of = {task: _LEFT + number * self.unit for number, task in enumerate(layout.order)}
        self.colours = _group_colours(layout.groups)
        self.most_macs = max((stage.macs for stage in layout.stages), default=0)
        self.axes: Axes

    def figure(self, title: str, subtitle: str) -> Figure:
        height = self._height()
        figure = Figure(figsize=(_WIDTH, height))
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self._text(0.15, 0.22, cut(title, 72, "…"), size=11, weight="bold")
        self._text(0.15, 0.46, subtitle, size=8)
        self._legend(0.72)
        if self.most_macs:
            self._text(_BARS, 0.93, "multiply-adds per sample", size=7)
        top = _HEAD
        for number, stage in enumerate(self.layout.stages):
            top = self._stage(stage, top, shaded=number % 2 == 0)
        self._name_groups(top)
        return figure

    def _height(self) -> float:
        rows = self.layout.rows
        forks = sum(row.fork is not None for row in rows)
        return _HEAD + _ROW * len(rows) + _GAP * len(self.layout.stages) + _FORK * forks + self._foot()

    def _foot(self) -> float:
        """The height of the groups' names."""
        groups = self.layout.groups
        if len(groups) <= _SIDE_BY_SIDE:
            return _FOOT + 0.12 * max(len(self._listed(group)) for group in groups)
        if len(groups) <= _UPRIGHT:
            return _FOOT + 0.055 * max(len(_short_name(group)) for group in groups)
        return _FOOT + 0.15

    def _stage(self, stage: PictureStage, top: float, shaded: bool) -> float:
        forks = sum(row.fork is not None for row in stage.rows)
        bottom = top + _GAP + _ROW * len(stage.rows) + _FORK * forks
        if shaded:
            self.axes.add_patch(Rectangle((0.08, top), _WIDTH - 0.16, bottom - top, color="#f3f4f6", linewidth=0))
        middle = (top + bottom) / 2
        self._text(_STAGE, middle, cut(stage.name, 18, "…"), size=7.5, ha="right")
        if stage.plain_macs:
            self._macs(stage, middle)
        top += _GAP / 2
        for row in stage.rows:
            if row.fork:
                self._fork(row, top)
                top += _FORK
            self._text(_LABEL, top + _ROW / 2, _row_label(stage, row), size=6, ha="right")
            for lane in row.lanes:
                self._lane(lane, top)
            if any(lane.kind == "shared" for lane in row.lanes):
                self._tie(row.lanes, top)
            top += _ROW
        return bottom

    def _lane(self, lane: Lane, top: float) -> None:
        colour = _ONCE if lane.kind == "once" else self._colour(lane.tasks)
        face = _pale(colour) if lane.kind == "shared" else colour
        for left, right in self._runs(lane.tasks):
            bar = Rectangle((left, top + 0.1 * _ROW), right - left, 0.8 * _ROW, facecolor=face, edgecolor=colour)
            bar.set_linewidth(0.7 if right - left > 0.1 else 0.3)
            bar.set_gid(f"lane {lane.kind}")
            self.axes.add_patch(bar)

    def _tie(self, lanes: Sequence[Lane], top: float) -> None:
        """A thread through the bars of one layer: the same weights in all of them."""
        ends = [end for lane in lanes for run in self._runs(lane.tasks) for end in run]
        middle = [top + _ROW / 2] * 2
        self.axes.plot([min(ends), max(ends)], middle, color=_INK, linewidth=0.5, alpha=0.55, gid="tie")

    def _fork(self, row: LayerRow, top: float) -> None:
        """From the middle of each group's lane to those of the groups that it falls into."""
        before, after = row.fork or ((), ())
        self._text(_LABEL, top + _FORK / 2, "branch point", size=6.5, ha="right", style="italic", weight="bold")
        for parent in before.groups:  # type: ignore[union-attr]
            parts = after.restrict(parent).groups  # type: ignore[union-attr]
            for part in parts if len(parts) > 1 else ():
                start, end = self._middle(parent), self._middle(part)
                points = [(start, top), (start, top + 0.6 * _FORK), (end, top + 0.4 * _FORK), (end, top + _FORK)]
                curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3])
                width = 1.4 if len(parts) <= 12 else 0.7
                self.axes.add_patch(
                    PathPatch(curve, fill=False, edgecolor=self._colour(part), linewidth=width, gid="fork")
                )

    def _macs(self, stage: PictureStage, middle: float) -> None:
        scale = _LARGEST / self.most_macs
        for count, colour in ((stage.macs, _ADDED), (stage.plain_macs, _ONCE)):
            self.axes.add_patch(
                Rectangle((_BARS, middle - 0.04), count * scale, 0.08, color=colour, linewidth=0, gid="macs")
            )
        ratio = stage.macs / stage.plain_macs
        times = f"  {ratio:.2f}x" if stage.macs != stage.plain_macs else ""
        self._text(_COUNT, middle, f"{short_number(stage.plain_macs / self.samples)}{times}", size=6.5)

    def _legend(self, middle: float) -> None:
        sample = self.colours[self.layout.groups[0]]
        entries = (
            (_ONCE, _ONCE, "runs once"),
            (sample, _pale(sample), "runs for each group, same weights"),
            (sample, sample, "each group's own copy"),
        )
        for left, (edge, face, text) in zip((0.15, 1.15, 3.45), entries, strict=True):
            self.axes.add_patch(Rectangle((left, middle - 0.05), 0.2, 0.1, facecolor=face, edgecolor=edge))
            self._text(left + 0.27, middle, text, size=7)
            if edge != face:
                self.axes.plot([left, left + 0.2], [middle] * 2, color=_INK, linewidth=0.5, alpha=0.55)
        if self.most_macs:
            self.axes.add_patch(Rectangle((5.15, middle - 0.05), 0.2, 0.1, color=_ADDED, linewidth=0))
            self._text(5.42, middle, "multiply-adds that branching adds", size=7)

    def _name_groups(self, top: float) -> None:
        groups = self.layout.groups
        if len(groups) > _UPRIGHT:
            self._text((_LEFT + _RIGHT) / 2, top + 0.12, f"{len(groups)} groups", size=7, ha="center", gid="group")
            return
        for group in groups:
            if len(groups) <= _SIDE_BY_SIDE:
                text, turn = "\n".join(self._listed(group)), 0
            else:
                text, turn = _short_name(group), 90
            self._text(
                self._middle(group),
                top + 0.06,
                text,
                size=6.5 if turn == 0 else min(6, 0.8 * 72 * (_RIGHT - _LEFT) / len(groups)),
                ha="center",
                va="top",
                rotation=turn,
                color=tuple(0.75 * channel for channel in to_rgb(self._colour(group))),
                gid="group",
            )

    def _listed(self, group: Group) -> list[str]:
        """The group's tasks, in lines that fit below its lane."""
        columns = max(8, int(len(group) * self.unit / 0.056))
        lines = textwrap.wrap(", ".join(cut(task, columns - 1, "…") for task in group), columns)
        if len(lines) > _LINES:
            lines = [*lines[: _LINES - 1], "..."]
        return [f"{len(group)} tasks", *lines] if len(group) > 1 else lines

    def _runs(self, tasks: Group) -> list[tuple[float, float]]:
        """Where a group's tasks are side by side: left and right ends, a gap between neighbours left free."""
        places = sorted(self.layout.order.index(task) for task in tasks)
        starts = [p for p in places if p - 1 not in places]
        ends = [p + 1 for p in places if p + 1 not in places]
        gap = min(0.03, 0.12 * self.unit * min(end - start for start, end in zip(starts, ends, strict=True)))
        return [
            (_LEFT + start * self.unit + gap, _LEFT + end * self.unit - gap)
            for start, end in zip(starts, ends, strict=True)
        ]

    def _middle(self, tasks: Group) -> float:
        return sum(self.left_of[task] + self.unit / 2 for task in tasks) / len(tasks)

    def _colour(self, tasks: Group) -> Any:
        """That of the group; a lane that several groups share has the mean of theirs."""
        colours = [to_rgb(self.colours[group]) for group in self.layout.groups if not set(tasks).isdisjoint(group)]
        return tuple(sum(channel) / len(colours) for channel in zip(*colours, strict=True))

    def _text(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        self.axes.text(x, y, text, **{"fontsize": size, "va": "center", "color": _INK, **options})


def _group_colours(groups: Sequence[Group]) -> dict[Group, Any]:
    if len(groups) <= 10:
        palette: Callable[[int], Any] = colormaps["tab10"]
        return {group: palette(number) for number, group in enumerate(groups)}
    spread = colormaps["turbo"]
    return {group: spread(0.05 + 0.9 * number / (len(groups) - 1)) for number, group in enumerate(groups)}


def _row_label(stage: PictureStage, row: LayerRow) -> str:
    local = [name[len(stage.name) + 1 :] if stage.name else name for name in row.names]
    if len(local) == 1:
        return cut(local[0], 18, "…")
    together = ", ".join(local)
    return together if len(together) <= 18 else f"{len(local)} layers"


def _short_name(group: Group) -> str:
    name = cut(group[0], 18, "…")
    return name if len(group) == 1 else f"{name} + {len(group) - 1}"


def _pale(colour: Any) -> Any:
    return tuple(1 - 0.25 * (1 - channel) for channel in to_rgb(colour))
