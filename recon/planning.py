"""BranchPlan, and the selectors that make one from a conflict map."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import nn

from recon.conflict_map import ConflictMap
from recon.errors import PlanError, some
from recon.layers import canonical_name, find_layers
from recon.matching import Match, match
from recon.partition import Partition

logger = logging.getLogger(__name__)

Mode = Literal["fan", "per-task"]


@dataclass(frozen=True)
class BranchPlan:
    """Which layers are branched, and into which groups of tasks.

    Args:
        tasks: all the tasks of the model.
        layers: `{layer name: partition of the tasks}`.
        statistics: `{module path: partition}`, the modules whose running statistics are kept per group because
            fanned values reach them; `None` until `recon.convert` has found them.
        task_modules: `{module path: tasks}`, the modules that serve only some of the tasks, and so run for those
            alone; `None` until `recon.convert` has found them.
        mode: how the branched model runs, as `recon.convert` was told.
    """

    tasks: tuple[str, ...]
    layers: Mapping[str, Partition]
    statistics: Mapping[str, Partition] | None = None
    task_modules: Mapping[str, tuple[str, ...]] | None = None
    mode: Mode = "fan"

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise PlanError(f"A branch plan needs at least two different tasks, but got {list(self.tasks)}.")
        if not self.layers:
            raise PlanError("The branch plan names no layer. Choose at least one (top_k=1, or layers=[...]).")
        for name, partition in self.layers.items():
            if partition.tasks != self.tasks:
                raise PlanError(
                    f"Layer {name!r} is split over tasks {list(partition.tasks)}, but the plan is for "
                    f"{list(self.tasks)}."
                )

    @classmethod
    def per_task(cls, layer_names: Iterable[str], tasks: Sequence[str]) -> BranchPlan:
        """Recon's plan (Shi et al. 2023, sec. 3.3): a copy of each named layer for every task.

        Raises:
            PlanError: no layer, a layer named twice, or fewer than two different tasks.
        """
        return cls.grouped({name: list(tasks) for name in _once(layer_names)}, tasks)

    @classmethod
    def grouped(cls, groups: Mapping[str, Sequence[str | Sequence[str]]], tasks: Sequence[str]) -> BranchPlan:
        """A plan by hand: `{layer name: groups of tasks}`; a bare task name is a group of one.

        Raises:
            PlanError: a layer's groups leave a task out, name one twice, or put all tasks into one group.
        """
        plan = {}
        for name, split in groups.items():
            partition = Partition.of_groups(split, tasks)
            if len(partition.groups) < 2:
                raise PlanError(f"Layer {name!r} has one group, so it is not branched. Leave it out of the plan.")
            plan[name] = partition
        return cls(tuple(tasks), plan)

    def on(self, model: nn.Module) -> BranchPlan:
        """The same plan with each layer under its first path in `model`.

        Raises:
            UnknownNameError: the model has no such layer; the message gives the nearest names.
        """
        layers = find_layers(model)
        named = {canonical_name(layers, name): partition for name, partition in self.layers.items()}
        return replace(self, layers={layer.name: named[layer.name] for layer in layers if layer.name in named})


def plan(
    cmap: ConflictMap | Match,
    model: nn.Module,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    select: Literal["top", "random"] = "top",
    seed: int = 0,
    layers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> BranchPlan:
    """Choose which layers of `model` to branch, one copy per task (Shi et al. 2023, algorithm 1).

    The map may come from another data set, other tasks or a variant of the architecture: those of its layers that are
    in the model are ranked, the others are left out with a warning (see `recon.matching.match`).

    Args:
        cmap: the conflict map; or what `recon.matching.match` made of it, which is then taken as it is.
        model: the unbranched model.
        top_k: how many layers to branch.
        threshold: S of the scores; the map's own when not given.
        select: `top` takes the highest scores; `random` is the control, `top_k` shared layers at random.
        seed: of the random control.
        layers: names the layers, instead of `top_k`.
        tasks: the tasks of the model, if they are not the map's.
        rename: `{old prefix: new prefix}` of the map's layer names, where the model has others.

    Raises:
        MapMismatchError: none of the map's layers is in the model.
        PlanError: both or neither of `top_k` and `layers`, `top_k` out of range, or tasks that the map does not name.
        UnknownNameError: a layer in `layers` does not exist, or a rename changes no name.
        UsageError: the map has no scores at this threshold.
    """
    if (top_k is None) == (layers is None):
        raise PlanError("Choose the layers either by top_k=... or by layers=[...], one of the two.")
    if rename and isinstance(cmap, Match):
        raise PlanError("The map was matched already. Pass rename=... to match().")
    found = cmap if isinstance(cmap, Match) else _match(cmap, model, rename)
    tasks = tuple(tasks or found.cmap.tasks)
    if not tasks:
        raise PlanError("The map does not name the tasks it was made for. Pass the model's: tasks=(...).")
    if layers is not None:
        return BranchPlan.per_task(layers, tasks).on(model)
    shared = list(found.matched)
    if top_k is None or not 1 <= top_k <= len(shared):
        raise PlanError(
            f"top_k is {top_k}, but the map has {len(shared)} shared layers"
            f"{' of this model' if found.missing else ''}. Choose between 1 and {len(shared)}."
        )
    chosen = found.cmap.ranking(threshold)
    if select == "random":
        chosen = random.Random(seed).sample(shared, len(shared))
    elif select != "top":
        raise PlanError(f"select is {select!r}. Choose 'top' or 'random'.")
    return BranchPlan.per_task(chosen[:top_k], tasks).on(model)


def checked_mode(mode: str) -> Mode:
    """`mode`, if there is such a one.

    Raises:
        PlanError: there is not.
    """
    if mode not in get_args(Mode):
        raise PlanError(f"mode is {mode!r}. Choose {' or '.join(map(repr, get_args(Mode)))}.")
    return cast(Mode, mode)


def _match(cmap: ConflictMap, model: nn.Module, rename: Mapping[str, str] | None) -> Match:
    found = match(cmap, model, rename)
    for warning in found.warnings():
        logger.warning("%s", warning)
    return found


def _once(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise PlanError(f"The layers are the string {names!r}. Pass a list of names: [{names!r}].")
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"The plan names {some(twice)} twice. Name each layer once.")
    return names
