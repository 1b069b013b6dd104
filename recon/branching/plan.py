"""BranchPlan: which layers are branched, and into which groups of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import nn

from recon.branching.partition import Partition
from recon.errors import PlanError, shortened
from recon.support.network.layers import canonical_name, find_layers, unwrapped

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
        mode: how the branched model runs; see `recon.convert`.
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


def plan_of(branched: nn.Module) -> BranchPlan:
    """The plan that a branched model was made with.

    Raises:
        PlanError: the model is not branched.
    """
    plan = find_plan(branched)
    if plan is None:
        if find_plan(unwrapped(branched)):
            raise PlanError(
                f"The branched model is wrapped in {type(branched).__name__}. Pass the module inside (model.module)."
            )
        raise PlanError("The model is not branched. Branch it first: recon.convert(model, plan, example_inputs).")
    return plan


def find_plan(model: nn.Module) -> BranchPlan | None:
    """The plan that a model was branched with; `None` if it is not branched."""
    plan = getattr(model, "branch_plan", None)
    return plan if isinstance(plan, BranchPlan) else None


def checked_mode(mode: str) -> Mode:
    """The mode itself; raises PlanError if there is no such mode."""
    if mode not in get_args(Mode):
        raise PlanError(f"mode is {mode!r}. Choose {' or '.join(map(repr, get_args(Mode)))}.")
    return cast(Mode, mode)


def _once(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise PlanError(f"The layers are the string {names!r}. Pass a list of names: [{names!r}].")
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"The plan names {shortened(twice)} twice. Name each layer once.")
    return names
