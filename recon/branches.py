"""The modules that a branched model is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from recon.batches import check_outputs
from recon.fan import map_groups, merge, partition_of, restrict, value_for, within
from recon.partition import Group, Partition, group_name


class Branches(nn.Module):
    """Modules by group. Unlike `nn.ModuleDict` it takes any task name, `keys` and `type` included."""

    def __init__(self, by_group: Mapping[Group, nn.Module]) -> None:
        super().__init__()
        for group, module in by_group.items():
            self._modules[group_name(group)] = module

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Group name and module, in order."""
        return ((name, module) for name, module in self._modules.items() if module is not None)

    def at(self, partition: Partition, group: Group) -> nn.Module:
        """The module of the group that `group` lies within."""
        module = self._modules[group_name(partition.groups[partition.label_of[group[0]]])]
        assert module is not None
        return module


class Branched(nn.Module):
    """A layer with one copy per task group; its output is a task fan.

    A group's copy is the submodule `branches.<group>`. Attributes of the layer (`conv.weight`) read as fans.
    """

    branches: Branches

    def __init__(self, partition: Partition, copies: Mapping[Group, nn.Module]) -> None:
        super().__init__()
        self.partition = partition
        self.branches = Branches(copies)
        self.register_load_state_dict_pre_hook(_load_original_into_branches)

    def branch(self, group: Group) -> nn.Module:
        """The copy that serves a group of tasks, or a part of one."""
        return self.branches.at(self.partition, group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run each group's copy on what the group's tasks see."""
        arriving = partition_of((args, kwargs))
        partition = self.partition if arriving is None else self.partition.restrict(arriving.tasks)
        results = [self.branch(group)(*within(args, group), **within(kwargs, group)) for group in partition.groups]
        return merge(partition, results)

    def originals(self, key: str) -> bool:
        """Whether a state entry of the unbranched layer belongs to the branches: all of them do."""
        return True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "branches" not in self._modules:
                raise
        values = [getattr(self.branch(group), name) for group in self.partition.groups]
        if isinstance(values[0], Tensor) or not callable(values[0]):
            return merge(self.partition, values)

        def method(*args: Any, **kwargs: Any) -> Any:
            results = [
                value(*within(args, group), **within(kwargs, group))
                for group, value in zip(self.partition.groups, values, strict=True)
            ]
            return merge(self.partition, results)

        return method


class BranchedParameter(Branched):
    """A bare parameter of a container, with one copy per task group; the container's attribute reads as a fan."""

    def __init__(self, name: str, partition: Partition, copies: Mapping[Group, nn.Parameter]) -> None:
        super().__init__(partition, {group: _Holder(name, parameter) for group, parameter in copies.items()})
        self.name = name

    def put_into(self, container: nn.Module) -> None:
        """Take the parameter's place in its container."""
        del container._parameters[self.name]
        container._modules[self.name] = self
        # A module is found only after the class's own attributes, so a property can hand out the fan.
        fan = property(lambda module: getattr(module._modules[self.name], self.name))
        cls = type(container)
        fields = {self.name: fan, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        container.__class__ = type(cls.__name__, (cls,), fields)
        container.register_load_state_dict_pre_hook(_LoadBareParameter(self.name))

    def give_back(self, container: nn.Module, group: Group) -> None:
        """Undo `put_into`, leaving one group's copy as the container's parameter."""
        del container._modules[self.name]
        container.__class__ = next(c for c in type(container).__mro__ if self.name not in vars(c))
        container.register_parameter(self.name, getattr(self.branch(group), self.name))


class BranchedStatistics(nn.Module):
    """A shared layer whose buffers (running statistics) are kept once per task group.

    The published code runs a shared BatchNorm once per task and lets the tasks overwrite one set of statistics,
    which then fits none of them. Here the parameters stay shared, under their own names, and each group's buffers
    are at `branches.<group>`.
    """

    branches: Branches
    layer: nn.Module

    def __init__(self, layer: nn.Module, partition: Partition) -> None:
        super().__init__()
        self.partition = partition
        # Not registered as a child: its parameters and children are this module's own, so that their names stay.
        object.__setattr__(self, "layer", layer)
        self._parameters = layer._parameters
        self._modules.update(layer._modules)
        self.branches = Branches({group: _Buffers(layer) for group in partition.groups})
        self.training = layer.training
        self.register_load_state_dict_pre_hook(_load_original_into_branches)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer once per group, on that group's statistics."""

        def run(group: Group, *group_args: Any, **group_kwargs: Any) -> Any:
            with self._buffers_of(group):
                return self.layer(*group_args, **group_kwargs)

        return map_groups(run, self.partition, args, kwargs)

    def branch(self, group: Group) -> nn.Module:
        """The plain layer as a group has it: the shared parameters, the group's buffers."""
        with self._buffers_of(group) as layer:
            memo: dict[int, Any] = {id(p): p for p in layer.parameters()}
            return copy.deepcopy(layer, memo)

    @contextmanager
    def _buffers_of(self, group: Group) -> Iterator[nn.Module]:
        kept = self.layer._buffers
        self.layer.training = self.training
        self.layer._buffers = self.branches.at(self.partition, group)._buffers
        try:
            yield self.layer
        finally:
            self.layer._buffers = kept

    def originals(self, key: str) -> bool:
        """Whether a state entry of the unbranched layer belongs to the branches: its own buffers do."""
        return key in self.layer._buffers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "branches" not in self._modules:
                raise
        if name in self.layer._buffers:
            return merge(self.partition, [getattr(buffers, name) for _, buffers in self.branches.items()])
        return getattr(self.layer, name)


class _Buffers(nn.Module):
    """A copy of a module's own buffers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, buffer in layer._buffers.items():
            persistent = name not in layer._non_persistent_buffers_set
            self.register_buffer(name, None if buffer is None else buffer.detach().clone(), persistent)


class _Holder(nn.Module):
    """One group's copy of a bare parameter."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter(name, parameter)


class TasksOnly:
    """Forward pre-hook of a module that serves some tasks only: it sees no other task's values."""

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Restrict the fans among the inputs."""
        return restrict(args, self.tasks), restrict(kwargs, self.tasks)


class SplitOutputs:
    """Forward hook of the whole model: each task's entry of the output holds that task's value."""

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> dict[str, Any]:
        """Take the fans apart."""
        output = check_outputs(output, self.tasks)
        return {task: value_for(output[task], task) for task in self.tasks}


def is_surgical(hook: object) -> bool:
    """Whether a forward hook was put there by the surgery."""
    return isinstance(hook, (TasksOnly, SplitOutputs))


def _load_original_into_branches(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a checkpoint from before the surgery load: every branch gets the layer's own entries."""
    assert isinstance(module, (Branched, BranchedStatistics))
    inside = f"{prefix}branches."
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inside)]:
        name = key[len(prefix) :]
        if module.originals(name):
            value = state_dict.pop(key)
            for group, _ in module.branches.items():
                state_dict.setdefault(f"{inside}{group}.{name}", value)


class _LoadBareParameter:
    """The same for a bare parameter, whose own entry lies beside the branches, in the container."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        branched = module._modules.get(self.name)
        if isinstance(branched, BranchedParameter) and prefix + self.name in state_dict:
            value = state_dict.pop(prefix + self.name)
            for group, _ in branched.branches.items():
                state_dict.setdefault(f"{prefix}{self.name}.branches.{group}.{self.name}", value)


def named_surgical_modules(model: nn.Module) -> Iterator[tuple[str, Branched | BranchedStatistics]]:
    """The outermost branched modules of a model, by every path that reaches them."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (Branched, BranchedStatistics)) and "branches" not in path.split("."):
            yield path, module
