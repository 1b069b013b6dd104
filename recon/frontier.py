"""The trade-off between plans: conflict covered against parameters and against multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from recon.errors import PlanError, UsageError
from recon.planning import BranchPlan
from recon.tables import text_table

if TYPE_CHECKING:
    from recon.conflict_map import ConflictMap
    from recon.cost_model import CostModel
    from recon.partition import Partition

Select = Callable[..., BranchPlan]
"""`recon.plan` with all but the selector filled in: takes `top_k=K`, `max_params=R` or `max_macs=R`."""

BUDGETS = (1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0, 20.0)
"""Ratios to the unbranched model at which budgeted plans are made, as far as any plan costs as much."""


@dataclass(frozen=True)
class Point:
    """One plan, what it covers and what it costs.

    Args:
        selector: how its layers were chosen: `top_k=3`, `max_macs=1.25`, or what the caller says of its own plan.
        layers: `{layer name: partition of the tasks}`, in model order.
        covered: the part of all conflicts that its branched layers hold, in [0, 1].
        parameters_ratio: parameters, divided by those of the unbranched model.
        macs_ratio: forward multiply-adds, likewise.
        optimal: whether no other point covers as much at no more parameters and no more multiply-adds, one of the
            three being better (Pareto's condition).
        chosen: whether this is the caller's own plan.
    """

    selector: str
    layers: Mapping[str, Partition]
    covered: float
    parameters_ratio: float
    macs_ratio: float
    optimal: bool = False
    chosen: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether a budget chose the layers."""
        return self.selector.startswith("max_")

    def as_dict(self) -> dict[str, Any]:
        """The point as plain values."""
        return {
            "selector": self.selector,
            "covered": self.covered,
            "parameters_ratio": self.parameters_ratio,
            "macs_ratio": self.macs_ratio,
            "optimal": self.optimal,
            "chosen": self.chosen,
            "layers": {name: [list(group) for group in split.groups] for name, split in self.layers.items()},
        }


def frontier(
    cmap: ConflictMap,
    cost_model: CostModel,
    select: Select,
    *,
    budgets: Sequence[float] = BUDGETS,
    threshold: float | None = None,
    chosen: BranchPlan | None = None,
    chosen_by: str = "chosen",
) -> list[Point]:
    """The plans of every K of the ranking, and those that are best under a series of budgets.

    Args:
        cmap: the conflict map, under the model's names, as `recon.matching.match` gives it.
        cost_model: of the unbranched model.
        select: makes each plan.
        budgets: ratios, each taken once for the parameters and once for the multiply-adds; those that even the
            dearest of the other plans keep are left out, and so are those that no plan keeps.
        threshold: S of the scores; the map's own when not given.
        chosen: a plan to mark; it becomes a point of its own if it is none of the others.
        chosen_by: what to call it then.

    Returns:
        The points: by K, then by budget, then `chosen`.

    Raises:
        PlanError, UsageError: as `select` for the plans of every K, and as `conflict_covered`.
    """

    def point(selector: str, plan: BranchPlan) -> Point:
        costs = cost_model.of(plan.layers)
        covered = conflict_covered(cmap, plan.layers, threshold)
        return Point(selector, plan.layers, covered, costs.parameters_ratio, costs.macs_ratio)

    points = [point(f"top_k={k}", select(top_k=k)) for k in range(1, len(cmap.layers) + 1)]
    for limit, dearest in (
        ("max_params", max(p.parameters_ratio for p in points)),
        ("max_macs", max(p.macs_ratio for p in points)),
    ):
        for budget in (budget for budget in budgets if budget < dearest):
            try:
                points.append(point(f"{limit}={budget:g}", select(**{limit: budget})))
            except PlanError:  # no layer fits
                continue
    if chosen is not None and all(p.layers != chosen.layers for p in points):
        points.append(point(chosen_by, chosen))
    return [
        replace(p, optimal=_is_optimal(p, points), chosen=chosen is not None and p.layers == chosen.layers)
        for p in points
    ]


def conflict_covered(cmap: ConflictMap, layers: Mapping[str, Partition], threshold: float | None = None) -> float:
    """The part of the conflicts in all shared layers that is between tasks whom `layers` gives different copies.

    Args:
        cmap: the conflict map.
        layers: `{layer name: partition of the tasks}`; a layer that is not in the map covers nothing.
        threshold: S of the scores. Between which tasks a layer's conflicts are is known at the map's own S alone, and
            taken to be the same at others.

    Raises:
        UsageError: the map has no scores at this threshold, or a partition has groups of several tasks and the map
            does not know which tasks conflict.
    """
    scores = cmap.scores(threshold)
    total = sum(scores.values())
    return sum(scores[name] * _separated(cmap, name, split) for name, split in layers.items() if name in scores) / (
        total or 1
    )


def frontier_table(points: Sequence[Point]) -> str:
    """The points as text, the optimal ones and the chosen one marked."""
    rows = [
        [
            (">" if p.chosen else " ") + ("*" if p.optimal else ""),
            p.selector,
            f"{len(p.layers)}",
            f"{100 * p.covered:.1f} %",
            f"{p.parameters_ratio:.3f}x",
            f"{p.macs_ratio:.3f}x",
        ]
        for p in points
    ]
    header = ["", "plan", "layers", "conflict covered", "parameters", "multiply-adds"]
    notes = "* no other plan here covers as much for as little"
    notes += "; > the plan that was chosen" if any(p.chosen for p in points) else ""
    return f"{text_table(header, rows, left=2)}\n{notes}."


def _separated(cmap: ConflictMap, name: str, split: Partition) -> float:
    """The part of a layer's conflicts that is between tasks in different groups."""
    if len(split.groups) == len(split.tasks):
        return 1.0
    counts = next(layer.conflicts for layer in cmap.layers if layer.name == name)
    if counts is None or set(split.tasks) != set(cmap.tasks):
        raise UsageError(
            f"Layer {name!r} is branched into groups of several tasks, but the map does not know which of these tasks "
            "conflict there. Profile them with recon, or branch with one group per task."
        )
    by_pair = counts.sum(axis=0)
    apart = [split.label_of[one] != split.label_of[other] for one, other in cmap.pairs]
    return float(by_pair[apart].sum() / max(1, by_pair.sum()))


def _is_optimal(point: Point, points: Sequence[Point]) -> bool:
    return not any(_dominates(other, point) for other in points)


def _dominates(one: Point, other: Point) -> bool:
    ours, theirs = ((p.covered, -p.parameters_ratio, -p.macs_ratio) for p in (one, other))
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))
