"""From a conflict map to a branch plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from recon.branching import BranchPlan, Partition
from recon.branching.plan import Mode
from recon.errors import PlanError
from recon.maps import ConflictMap
from recon.maps.measures import By
from recon.plans.choice import Choice
from recon.plans.choosing import chosen_layers
from recon.plans.costing.cost_model import CostModel
from recon.plans.evidence import check_conflict, notes
from recon.plans.grouping import Groups, partitions
from recon.plans.matching import Match, match
from recon.plans.scoring import Scoring
from recon.plans.selection import Select, Selection
from recon.support.network.layer_choice import Patterns

__all__ = ["BranchPlan", "Choice", "Mode", "choose", "plan"]

logger = logging.getLogger(__name__)


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
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    units: Patterns | None = None,
    like: BranchPlan | None = None,
    select: Select = "top",
    groups: Groups = "per-task",
    threshold: float | None = None,
    by: By | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> BranchPlan:
    """Choose which layers of `model` to branch, and which tasks share a copy.

    One of `top_k`, `share`, the budgets `max_params` and `max_macs` (alone or together), `auto`, `like` and `layers`
    chooses the layers; beside another one, `layers` says among which. With none but `groups="per-task"` and `top_k`,
    this is Recon (Shi et al. 2023, algorithm 1). Scores are those of the pairs of the plan's tasks. A map of other
    tasks is scored over all its pairs, with a warning; pairs that never or rarely met in a step of the profile are
    named in one too.

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
        auto: branch the layers that conflict above their noise floor, in a map that has one and unless `by` says
            otherwise (`recon.plans.selection.layers_above_floor`); else those that conflict more than the mean layer
            beyond the noise of the steps (`recon.plans.selection.sure_layers`).
        layers: names the layers; or one regular expression, which must match the whole name of a shared layer. Beside
            another way to choose: the shared layers to choose among, by one or more names or expressions.
        exclude: leaves out the layers whose whole name matches one of these regular expressions.
        units: regular expressions that join layers into units, which are branched together or not at all; see
            `recon.Profiler`. A unit has the conflicts of all its layers. The plan names the layers.
        like: choose as many parameters as this plan adds, by `select`: a control for it.
        select: the order in which layers are taken. `top` is by score. The others are controls: `random`; the `first`
            or the `last` in model order; the `norms` by score, all of them if nothing else is said. With a budget or
            `like`, as many as fit are taken: `random` and `norms` pass over a layer that does not, `first` and `last`
            end before it.
        groups: `"per-task"`, one copy a task; a number of groups, the same in every layer; `"conflict"`, tasks that
            rarely conflict in a layer share it; or a list of groups. They nest: see `recon.plans.grouping.partitions`.
        threshold: S of the scores; the map's own when not given.
        by: what the scores are: `count`, the conflicts (Recon); `rate`, their share of the steps in which a pair met;
            `excess`, how far that lies above the noise floor. By count when not given, but for `auto`.
        seed: of `select="random"`.
        tasks: the tasks of the model, if they are not the map's.
        rename: `{old prefix: new prefix}` of the map's layer names, where the model has others.

    Raises:
        MapMismatchError: none of the map's layers is in the model.
        PlanError: no or several ways to choose, one that is out of range, a choice by scores that are all 0 (no
            conflict, or none above the noise), a budget below 1 or one that no layer fits, a
            budget without example inputs, groups that are no partition of the tasks, or tasks that the map does not
            name.
        UnknownNameError: a layer in `layers` does not exist, a regular expression matches none, or a rename changes
            no name.
        UsageError: the map has no scores at this threshold or for these tasks, none over time for `auto`, or no noise
            floor for `by="excess"`; the forward fails; a regular expression is none, or a unit joins nothing.
    """
    selection = Selection(
        top_k, share, max_params, max_macs, auto, layers, like, select, seed, exclude=exclude, units=units, by=by
    )
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
    for note in choice.notes:
        logger.warning("%s", note)
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
    tasks, by, candidates = tuple(tasks), selection.by_of(found.cmap), selection.candidates(found)
    scoring = Scoring(candidates.cmap, tasks, threshold, by)
    if selection.by_score:
        check_conflict(scoring)
    split = partitions(candidates.cmap, tasks, groups, by)
    chosen = chosen_layers(candidates, model, selection, scoring, split, costs)
    names = list(BranchPlan.per_task(candidates.expand(chosen.names), tasks).on(model).layers)
    by_layer = {member: partition for name, partition in split.items() for member in candidates.members(name)}
    of_all = _with_unscored(names, by_layer, groups)
    branched = {name: of_all[name] for name in names}
    return Choice(
        BranchPlan(tasks, branched),
        chosen.reason,
        {**scoring.scores, **_left_out(found, candidates, tasks, threshold, by)},
        scoring.parted(split),
        candidates.units,
        by,
        scoring.never_met,
        chosen.sure,
        notes(scoring, [name for name in chosen.names if name in split], branched.values(), selection.by_score),
    )


def _left_out(
    found: Match, candidates: Match, tasks: tuple[str, ...], threshold: float | None, by: By
) -> dict[str, float]:
    """The scores of the map's layers that are no candidates."""
    kept = set(candidates.expand(candidates.matched))
    layers = [layer for layer in found.cmap.layers if not kept.issuperset(found.members(layer.name))]
    return dict(Scoring(replace(found.cmap, layers=layers), tasks, threshold, by).scores) if layers else {}


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
