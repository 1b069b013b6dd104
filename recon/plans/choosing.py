"""Chooses layers in one of the ways of a `Selection`: by score, by share, within a budget, or as a control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from recon.branching import BranchPlan, Partition
from recon.errors import PlanError
from recon.plans.budget import Chooser, take
from recon.plans.costing.cost_model import CostModel
from recon.plans.matching import Match
from recon.plans.scoring import Scoring
from recon.plans.selection import Selection, checked_k, holding_share, layers_above_floor, sure_layers
from recon.support.network.layers import find_layers


@dataclass(frozen=True)
class Chosen:
    """Layers, and units of the match.

    Args:
        names: theirs.
        reason: why those.
        sure: `{layer: how likely it conflicts above its noise floor}`, of all, where that chose them.
    """

    names: Sequence[str]
    reason: str
    sure: Mapping[str, float]


def chosen_layers(
    found: Match,
    model: nn.Module,
    selection: Selection,
    scoring: Scoring,
    split: Mapping[str, Partition],
    costs: CostModel | None,
) -> Chosen:
    """The layers that a selection chooses among those of a match, and why.

    Args:
        found: the layers and units to choose among.
        model: the unbranched model.
        selection: how to choose.
        scoring: of the match.
        split: how each layer splits the tasks.
        costs: of the model; needed for a budget.

    Raises:
        PlanError, UnknownNameError, UsageError: as `recon.plan`.
    """
    reason = selection.describe()
    if selection.is_named:
        return Chosen(selection.names(found), reason, {})
    if selection.auto:
        return _stand_out(scoring)
    if selection.share is not None:
        return Chosen(holding_share(scoring, selection.share), reason, {})
    order = selection.order(scoring, model)
    if selection.like is not None:
        return Chosen(_at_parameters_of(selection.like, order, selection.skips, split, found, model), reason, {})
    if selection.budget is not None:
        assert costs is not None
        chooser = Chooser(costs, split, scoring.parted(split), found.units)
        if selection.select != "top":
            return Chosen(chooser.fill(order, selection.budget, selection.skips), reason, {})
        greedy = "" if chooser.is_exact else ", as far as found greedily: the model's forward could not be traced"
        return Chosen(chooser.best(selection.budget), reason + greedy, {})
    if selection.top_k is None:
        return Chosen(order, reason, {})
    what = "norms among its shared layers" if selection.select == "norms" else "shared layers"
    what += " of this model" * bool(found.missing) + " to choose among" * selection.narrows
    return Chosen(order[: checked_k(selection.top_k, order, what)], reason, {})


def _stand_out(scoring: Scoring) -> Chosen:
    if scoring.threshold not in (None, scoring.cmap.threshold):
        raise PlanError(
            f"auto=True resamples the conflicts at the map's own S={scoring.cmap.threshold:g}, the only ones that the "
            "map holds over time. Leave the threshold out."
        )
    return Chosen(*layers_above_floor(scoring)) if scoring.by == "excess" else Chosen(*sure_layers(scoring), {})


def _at_parameters_of(
    like: BranchPlan, order: Sequence[str], skip: bool, split: Mapping[str, Partition], found: Match, model: nn.Module
) -> list[str]:
    """As many layers of `order` as add no more parameters than `like` does."""
    sizes = {layer.name: layer.size for layer in find_layers(model)}

    def added(names: Iterable[str]) -> int:
        copied = ((sum(sizes[member] for member in found.members(name)), split[name]) for name in names)
        return sum(size * (len(partition.groups) - 1) for size, partition in copied)

    given = like.on(model).layers
    limit = sum(sizes[name] * (len(partition.groups) - 1) for name, partition in given.items())
    chosen = take(order, lambda names: added(names) <= limit, skip)
    if not chosen:
        raise PlanError(
            f"The plan in like=... adds {limit:,} parameters, and {order[0]!r}, the first in line, alone adds "
            f"{added(order[:1]):,}. Use another select, or top_k."
        )
    return chosen
