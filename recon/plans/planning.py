"""From a conflict map to a branch plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from recon.branching import BranchPlan, Partition
from recon.branching.plan import Mode
from recon.errors import PlanError
from recon.maps import ConflictMap
from recon.plans.budget import Chooser, take
from recon.plans.costing.cost_model import CostModel
from recon.plans.grouping import Groups, partitions, separated
from recon.plans.matching import Match, match
from recon.plans.selection import Select, Selection, checked_k, holding_share, names_matching, sure_layers
from recon.support.network.layers import find_layers

__all__ = ["BranchPlan", "Choice", "Mode", "choose", "plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A plan, and what led to it.

    Args:
        plan: the plan.
        reason: how its layers were chosen.
        scores: `{shared layer: score}`, of all that the map has, in model order.
        parted: `{shared layer: conflicts between its groups}`, were it branched; its score with one group a task.
        units: `{unit: the layers that it joins}`, of the shared layers that are units of the map.
    """

    plan: BranchPlan
    reason: str
    scores: Mapping[str, int]
    parted: Mapping[str, int]
    units: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        chosen = self.scored
        all_scored = set(self.plan.layers) == {m for name in chosen for m in self.units.get(name, [name])}
        of = f" of {len(self.scores)} shared layers" if all_scored else " layers"
        return f"{len(chosen) if all_scored else len(self.plan.layers)}{of}: {self.reason}"

    @property
    def scored(self) -> list[str]:
        """The shared layers and units that the plan branches, a unit by all its layers."""
        return [name for name in self.scores if set(self.units.get(name, [name])) <= set(self.plan.layers)]

    @property
    def covered(self) -> float:
        """The conflicts that the plan parts, as a share of all; 0 if there is none."""
        return sum(self.parted[name] for name in self.scored) / max(1, sum(self.scores.values()))


def plan(
    cmap: ConflictMap | Match,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    top_k: int | None = None,
    share: float | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    auto: bool = False,
    layers: Sequence[str] | str | None = None,
    like: BranchPlan | None = None,
    select: Select = "top",
    groups: Groups = "per-task",
    threshold: float | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> BranchPlan:
    """Choose which layers of `model` to branch, and which tasks share a copy.

    One of `top_k`, `share`, the budgets `max_params` and `max_macs` (alone or together), `auto`, `like` and `layers`
    chooses the layers. With none but `groups="per-task"` and `top_k`, this is Recon (Shi et al. 2023, algorithm 1).

    The map may come from another data set, other tasks or a variant of the architecture: those of its layers that are
    in the model are ranked, the others are left out with a warning (see `recon.plans.matching.match`). Why the layers
    were chosen is logged (INFO).

    Args:
        cmap: the conflict map; or what `recon.plans.matching.match` made of it, which is then taken as it is.
        model: the unbranched model.
        example_inputs: a batch of inputs, as the model's forward accepts it; budgets are counted on it.
        top_k: how many layers to branch.
        share: branch the fewest layers that hold this share of all conflict, in (0, 1].
        max_params: cover the most conflict with at most so many times the model's parameters.
        max_macs: cover the most conflict with at most so many times its forward multiply-adds.
        auto: branch the layers that conflict more than the mean layer beyond the noise of the map
            (`recon.plans.selection.sure_layers`).
        layers: names the layers; or one regular expression, which must match the whole name of a shared layer.
        like: choose as many parameters as this plan adds, by `select`: a control for it.
        select: the order in which layers are taken. `top` is by score. The others are controls: `random`; the `first`
            or the `last` in model order; the `norms` by score, all of them if nothing else is said. With a budget or
            `like`, as many as fit are taken: `random` and `norms` pass over a layer that does not, `first` and `last`
            end before it.
        groups: `"per-task"`, one copy a task; a number of groups, the same in every layer; `"conflict"`, tasks that
            rarely conflict in a layer share it; or a list of groups. They nest: see `recon.plans.grouping.partitions`.
        threshold: S of the scores; the map's own when not given.
        seed: of `select="random"`.
        tasks: the tasks of the model, if they are not the map's.
        rename: `{old prefix: new prefix}` of the map's layer names, where the model has others.

    Raises:
        MapMismatchError: none of the map's layers is in the model.
        PlanError: no or several ways to choose, one that is out of range, a budget below 1 or one that no layer fits, a
            budget without example inputs, groups that are no partition of the tasks, or tasks that the map does not
            name.
        UnknownNameError: a layer in `layers` does not exist, a regular expression matches none, or a rename changes
            no name.
        UsageError: the map has no scores at this threshold, or none over time for `auto`; the forward fails.
    """
    selection = Selection(top_k, share, max_params, max_macs, auto, layers, like, select, seed)
    if rename and isinstance(cmap, Match):
        raise PlanError("The map was matched already. Pass rename=... to match().")
    found = cmap if isinstance(cmap, Match) else _match(cmap, model, rename)
    tasks = tuple(tasks or found.cmap.tasks)
    if not tasks:
        raise PlanError("The map does not name the tasks it was made for. Pass the model's: tasks=(...).")
    budget = selection.budget
    if budget is not None and example_inputs is None:
        raise PlanError(f"The costs in {budget} are counted on a batch of inputs. Pass it: example_inputs=...")
    costs = None if budget is None else CostModel(model, tasks, example_inputs)
    choice = choose(found, model, selection, tasks, groups=groups, threshold=threshold, costs=costs)
    logger.info("%s.", choice)
    return choice.plan


def choose(
    found: Match,
    model: nn.Module,
    selection: Selection,
    tasks: Sequence[str],
    *,
    groups: Groups = "per-task",
    threshold: float | None = None,
    costs: CostModel | None = None,
) -> Choice:
    """As `plan`, and says why.

    Args:
        found: the map, matched to the model.
        model: the unbranched model.
        selection: how to choose.
        tasks: the model's.
        groups: as in `plan`.
        threshold: as in `plan`.
        costs: of the model; needed for a budget.

    Raises:
        PlanError, UnknownNameError, UsageError: as `plan`.
    """
    cmap = found.cmap
    split = partitions(cmap, tasks, groups)
    parted = separated(cmap, split, threshold)
    names, reason = _names(found, model, selection, split, parted, threshold, costs)
    names = list(BranchPlan.per_task(found.expand(names), tasks).on(model).layers)
    by_layer = {member: partition for name, partition in split.items() for member in found.members(name)}
    of_all = _with_unscored(names, by_layer, groups)
    chosen = BranchPlan(tuple(tasks), {name: of_all[name] for name in names})
    return Choice(chosen, reason, cmap.scores(threshold), parted, found.units)


def _names(
    found: Match,
    model: nn.Module,
    selection: Selection,
    split: Mapping[str, Partition],
    parted: Mapping[str, int],
    threshold: float | None,
    costs: CostModel | None,
) -> tuple[list[str], str]:
    """The chosen layers, and why those."""
    cmap, reason = found.cmap, selection.describe()
    if isinstance(selection.layers, str):
        return names_matching(selection.layers, found.matched), reason
    if selection.layers is not None:
        return list(selection.layers), reason
    if selection.auto:
        if threshold not in (None, cmap.threshold):
            raise PlanError(
                f"auto=True resamples the conflicts at the map's own S={cmap.threshold:g}, the only ones that the map "
                "holds over time. Leave the threshold out."
            )
        return sure_layers(cmap)
    if selection.share is not None:
        return holding_share(cmap, selection.share, threshold), reason
    order = selection.order(cmap, model, threshold)
    if selection.like is not None:
        return _at_parameters_of(selection.like, order, selection.skips, split, found, model), reason
    if selection.budget is not None:
        assert costs is not None
        chooser = Chooser(costs, split, parted, found.units)
        if selection.select != "top":
            return chooser.fill(order, selection.budget, selection.skips), reason
        greedy = "" if chooser.is_exact else ", as far as found greedily: the model's forward could not be traced"
        return chooser.best(selection.budget), reason + greedy
    if selection.top_k is None:
        return order, reason
    what = "norms among its shared layers" if selection.select == "norms" else "shared layers"
    return order[: checked_k(selection.top_k, order, what + " of this model" * bool(found.missing))], reason


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


def _with_unscored(names: Sequence[str], split: Mapping[str, Partition], groups: Groups) -> Mapping[str, Partition]:
    """The partitions of the named layers too that the map does not score, where all layers have the same."""
    unscored = [name for name in names if name not in split]
    if unscored and groups == "conflict":
        raise PlanError(
            f"groups='conflict' needs the map's counts, but it has no layer {unscored[0]!r}. Choose among its shared "
            "layers, or use other groups."
        )
    return {**split, **dict.fromkeys(unscored, next(iter(split.values())))}


def _match(cmap: ConflictMap, model: nn.Module, rename: Mapping[str, str] | None) -> Match:
    found = match(cmap, model, rename)
    for warning in found.warnings():
        logger.warning("%s", warning)
    return found
