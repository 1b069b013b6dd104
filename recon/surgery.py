"""Surgery: convert a model into its branched form, and take one task's plain model out of it again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from recon.branches import (
    Branched,
    BranchedParameter,
    BranchedStatistics,
    SplitOutputs,
    TasksOnly,
    is_surgical,
    named_surgical_modules,
)
from recon.dry_run import find_statistics, find_task_modules
from recon.errors import PlanError, UnknownNameError, UsageError
from recon.fan import fans_in, value_for
from recon.layers import find_layers, places
from recon.partition import Group, Partition, refine
from recon.planning import BranchPlan

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)


def convert(model: nn.Module, plan: BranchPlan, example_inputs: Any = None) -> nn.Module:
    """Give the task groups of `plan` their own copies of its layers.

    The result is a copy of `model` whose forward runs unchanged: a branched layer returns a task fan, over which
    every later operation maps, and what comes before is computed once. For every task, its output equals that
    of the original architecture loaded with the task's copies. `model` itself is left untouched.

    Args:
        model: `model(inputs) -> {task name: output}`.
        plan: which layers, and which groups of tasks.
        example_inputs: a small batch of inputs (two samples or more), on the model's device. One dry forward finds
            the layers whose running statistics must follow the fan, and the modules that serve one task alone. Not
            needed when the plan lists them already (a plan of a branched or loaded model).

    Raises:
        UnknownNameError: the plan names a layer that the model does not have.
        PlanError: the model is branched already.
        UsageError: the model is wrapped (DDP, compiled, scripted), or cannot be copied or run.
        FanError: the forward has a statement that cannot work on values that differ between tasks.
    """
    _refuse_wrapped(model)
    if hasattr(model, "branch_plan"):
        raise PlanError("The model is branched already. Convert the unbranched model with a plan of all the layers.")
    plan = plan.on(model)
    branched = _copy(model)
    _branch_layers(branched, plan.layers)
    if plan.statistics is None:
        if example_inputs is None:
            raise UsageError("convert needs example_inputs: a small batch of inputs, as the model's forward takes it.")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UsageError("convert runs the model, but its parameters are on the meta device. Load weights first.")
        plan = replace(plan, statistics=find_statistics(branched, example_inputs))
    # Inner ones first: an outer one takes its children along as they are.
    for path, partition in sorted((plan.statistics or {}).items(), key=lambda item: -item[0].count(".")):
        _split_statistics(branched, path, partition)
    branched.register_forward_hook(SplitOutputs(plan.tasks))
    if plan.task_modules is None:
        plan = replace(plan, task_modules=find_task_modules(branched, plan.tasks, example_inputs))
    for path, tasks in (plan.task_modules or {}).items():
        _module_at(branched, path).register_forward_pre_hook(TasksOnly(tasks), with_kwargs=True)
    branched.branch_plan = plan  # type: ignore[assignment]
    return branched


def extract_task(branched: nn.Module, task: str) -> nn.Module:
    """The plain original architecture with one task's copies; its `state_dict` loads into the user's own class.

    Its output still has an entry for every task; only this task's means anything.

    Raises:
        PlanError: the model is not branched, or has no such task.
    """
    plan = plan_of(branched)
    if task not in plan.tasks:
        raise PlanError(f"There is no task {task!r} in this model; its tasks are {list(plan.tasks)}.")
    plain = _copy(branched)
    del plain.branch_plan
    for path, module in list(named_surgical_modules(plain)):
        parent_path, _, name = path.rpartition(".")
        parent = plain.get_submodule(parent_path)
        if not isinstance(module, BranchedParameter):
            setattr(parent, name, _plain(module, (task,)))
        elif parent._modules.get(name) is module:  # not if the container has two paths, and is done
            module.give_back(parent, (task,))
    for part in plain.modules():
        _drop_hooks(part)
        for attribute, value in vars(part).items():  # what the last forward left behind
            if fans_in(value):
                vars(part)[attribute] = value_for(value, task)
    return plain


def plan_of(branched: nn.Module) -> BranchPlan:
    """The plan that a branched model was made with.

    Raises:
        PlanError: the model is not branched.
    """
    plan = getattr(branched, "branch_plan", None)
    if not isinstance(plan, BranchPlan):
        raise PlanError("The model is not branched. Branch it first: recon.convert(model, plan, example_inputs).")
    return plan


def _branch_layers(model: nn.Module, layers: Mapping[str, Partition]) -> None:
    copies = _ParameterCopies(
        {
            p: layers[layer.name]
            for layer in find_layers(model)
            if layer.name in layers
            for p in layer.parameters.values()
        }
    )
    branched: dict[nn.Module, Branched] = {}
    for place in list(places(model)):
        partition = copies.partition_of(place.parameters.values())
        if partition is None:
            continue
        if isinstance(place.owner, nn.Parameter):
            if place.attribute not in place.parent._parameters:  # the container has two paths: done at the first
                continue
            parameters = {group: copies.get(place.owner, group) for group in partition.groups}
            BranchedParameter(place.attribute, partition, parameters).put_into(place.parent)
            continue
        if place.owner not in branched:  # a module reached by two paths is branched once
            modules = {group: copies.module(place.owner, group) for group in partition.groups}
            branched[place.owner] = Branched(partition, modules)
        setattr(place.parent, place.attribute, branched[place.owner])


class _ParameterCopies:
    """One copy of each branched parameter per group, however many modules hold it."""

    def __init__(self, partitions: Mapping[nn.Parameter, Partition]) -> None:
        self.partitions = partitions
        self.copies: dict[tuple[nn.Parameter, Group], nn.Parameter] = {}

    def partition_of(self, parameters: Iterable[nn.Parameter]) -> Partition | None:
        """The groups of a module with these parameters: tied weights may bring in several layers' partitions."""
        found = [self.partitions[p] for p in parameters if p in self.partitions]
        return refine(*found) if found else None

    def get(self, parameter: nn.Parameter, group: Group) -> nn.Parameter:
        partition = self.partitions.get(parameter)
        if partition is None:
            return parameter
        label = partition.label_of[group[0]]
        if label == 0:  # the first group takes over the original: nothing is copied needlessly
            return parameter
        key = (parameter, partition.groups[label])
        if key not in self.copies:
            self.copies[key] = copy.deepcopy(parameter)
        return self.copies[key]

    def module(self, module: nn.Module, group: Group) -> nn.Module:
        memo: dict[int, Any] = {id(p): self.get(p, group) for p in module.parameters()}
        return copy.deepcopy(module, memo)


def _split_statistics(model: nn.Module, path: str, partition: Partition) -> None:
    module = _module_at(model, path)
    split = BranchedStatistics(module, partition)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                setattr(parent, name, split)


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownNameError("module", path, [name for name, _ in model.named_modules()]) from error


def _plain(module: nn.Module, group: Group) -> nn.Module:
    """The copy that serves a group; a copy may keep its own statistics by group in turn."""
    while isinstance(module, (Branched, BranchedStatistics)):
        module = module.branch(group)
    return module


def _drop_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_surgical(hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UsageError(
            f"The model cannot be copied: {type(error).__name__}: {error}. A tensor kept as an attribute must be a "
            "parameter, a buffer or detached."
        ) from error


def _refuse_wrapped(model: nn.Module) -> None:
    # A compiled model exists only where torch.compile has loaded its compiler, which takes a second.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if isinstance(model, _WRAPPERS) or (compiler is not None and isinstance(model, compiler.OptimizedModule)):
        raise UsageError(
            f"The model is wrapped in {type(model).__name__}. Convert the plain module inside (model.module, or the "
            "model before torch.compile), then wrap the result."
        )
