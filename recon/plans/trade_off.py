"""The trade-off between plans: conflict covered against parameters and against multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from recon.branching import Partition
from recon.errors import PlanError
from recon.maps.measures import By
from recon.plans.choice import Choice
from recon.plans.costing.cost_model import CostModel
from recon.plans.grouping import Groups
from recon.plans.matching import Match
from recon.plans.planning import choose
from recon.plans.selection import Selection
from recon.support.network.layer_choice import Patterns
from recon.support.tables import text_table

BUDGETS = (1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0, 20.0)
"""Ratios to the unbranched model at which budgeted plans are made, as far as any plan costs as much."""


@dataclass(frozen=True)
class Point:
    """One plan, what it covers and what it costs.

    It is optimal if no other point covers as much at no more parameters and no more multiply-adds, one of the three
    being better (Pareto's condition).
    """

    selector: str  # `top_k=3`, `max_params=1.05`, `max_macs=1.25`, or `chosen` otherwise
    layers: Mapping[str, Partition]  # in model order
    covered: float  # the conflicts that it parts, as a share of all; see `recon.plans.planning.Choice`
    parameters_ratio: float
    macs_ratio: float  # of forward multiply-adds
    optimal: bool = False
    chosen: bool = False  # whether this is the caller's own plan

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
    found: Match,
    model: nn.Module,
    costs: CostModel,
    *,
    groups: Groups = "per-task",
    threshold: float | None = None,
    by: By | None = None,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    units: Patterns | None = None,
    budgets: Sequence[float] = BUDGETS,
    chosen: Choice | None = None,
) -> list[Point]:
    """The plans of every K of the ranking, and those that cover the most within a series of budgets.

    Args:
        found: the conflict map, matched to the model.
        model: the unbranched model.
        costs: of the model.
        groups: as in `recon.plan`.
        threshold: S of the scores; the map's own when not given.
        by: what the scores are, as in `recon.plan`.
        layers: the shared layers to choose among, as in `recon.plan`; so are `exclude` and `units`.
        exclude: see there.
        units: see there.
        budgets: ratios, each taken once for the parameters and once for the multiply-adds. Left out are those that no
            K exceeds, those within which no layer can be branched, and those whose plan is there already.
        chosen: what to mark; it becomes a new point if it is not one of the others.

    Returns:
        The points: by K, then by budget, then `chosen`.

    Raises:
        PlanError, UsageError: as `recon.plan`.
    """

    def point(selector: str, choice: Choice) -> Point:
        cost = costs.of(choice.plan.layers)
        return Point(selector, choice.plan.layers, choice.covered, cost.parameters_ratio, cost.macs_ratio)

    def choice(**how: Any) -> Choice:
        selection = replace(among, **how)
        return choose(found, model, selection, costs.tasks, groups=groups, threshold=threshold, costs=costs)

    among = Selection(top_k=1, layers=layers, exclude=exclude, units=units, by=by)
    points = [point(f"top_k={k}", choice(top_k=k)) for k in range(1, len(among.candidates(found).matched) + 1)]
    dearest = {
        "max_params": max(point.parameters_ratio for point in points),
        "max_macs": max(point.macs_ratio for point in points),
    }
    more: list[tuple[str, Choice]] = []
    for limit, budget in ((limit, budget) for limit in dearest for budget in budgets if budget < dearest[limit]):
        try:
            more.append((f"{limit}={budget:g}", choice(top_k=None, **{limit: budget})))
        except PlanError:  # no layer fits; any other error would have come up with the plans by K
            continue
    for selector, made in more + ([("chosen", chosen)] if chosen else []):
        if all(p.layers != made.plan.layers for p in points):
            points.append(point(selector, made))
    return [
        replace(
            p,
            optimal=not any(_dominates(other, p) for other in points),
            chosen=chosen is not None and p.layers == chosen.plan.layers,
        )
        for p in points
    ]


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


def _dominates(one: Point, other: Point) -> bool:
    ours, theirs = ((p.covered, -p.parameters_ratio, -p.macs_ratio) for p in (one, other))
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))
