"""Branched layers: one copy per task group, under the layer's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

import recon.branching.fans.autograd_functions
import recon.branching.fans.past_python  # noqa: F401  (makes what would read a fan's memory ask first)
from recon.branching.fans.compilers import leave_fans_alone
from recon.branching.fans.fan import TaskFan, merge
from recon.branching.fans.serving import served
from recon.branching.fans.statement import where
from recon.branching.fans.trees import partition_of, within
from recon.branching.fans.value import mark_origins, origins_of
from recon.branching.fans.watch import watcher
from recon.branching.modules.classes import Surgery, operate
from recon.branching.partition import Group, Partition, group_name
from recon.errors import FanError, UsageError

leave_fans_alone()


class Branches(nn.Module):
    """Modules by group. Unlike `nn.ModuleDict` it accepts any task name, even `keys` or `type`."""

    def __init__(self, partition: Partition, by_group: Mapping[Group, nn.Module]) -> None:
        super().__init__()
        self._partition = partition  # no name that a task may have
        for group, module in by_group.items():
            self._modules[group_name(group)] = module

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Group name and module, in order."""
        return ((name, module) for name, module in self._modules.items() if module is not None)

    def at(self, group: Group) -> nn.Module:
        """The module of the group that `group` lies within."""
        partition = self._partition
        module = self._modules[group_name(partition.groups[partition.label_of[group[0]]])]
        assert module is not None
        return module

    def assign(self, name: str, value: Any) -> None:
        """Set an attribute of every group's module; each gets its group's value of a fan.

        A parameter is then tied, as it is between any layers that one parameter is assigned to; of any other tensor,
        each module gets a copy.
        """
        for number, group in enumerate(self._partition.groups):
            mine = within(value, group)
            if type(mine) is TaskFan:
                raise FanError(
                    f"A value that differs between the tasks {list(group)} is assigned to {name!r}{where()}, which "
                    "these tasks share. Split them into finer groups in the plan, or assign to each group's copy (the "
                    "submodules of .branches) a value that all of its tasks can use."
                )
            if type(value) is TaskFan and isinstance(value, nn.Parameter):  # nn.Parameter(fan)
                mine = nn.Parameter(mine.detach(), mine.requires_grad)
            elif number and mine is value and isinstance(mine, Tensor) and not isinstance(mine, nn.Parameter):
                mine = mine.clone()
            setattr(self.at(group), name, mine)


class Branched(nn.Module):
    """A layer with one copy per task group; its output is a task fan.

    A group's copy is the submodule `branches.<group>`. Reading an attribute of the layer (`conv.weight`)
    gives a fan; assigning one (`conv.stride = 2`, `norm.momentum = 0.01`) assigns it to every copy.
    """

    branches: Branches

    def __init__(self, layer_name: str, partition: Partition, copies: Mapping[Group, nn.Module]) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.partition = partition
        self.branches = Branches(partition, copies)
        vars(self)["_parameters"] = _NoParameters(layer_name)
        self.training = all(module.training for module in copies.values())
        self.register_load_state_dict_pre_hook(_load_original_into_branches)

    def branch(self, group: Group) -> nn.Module:
        """The copy that serves a group of tasks, or a part of one."""
        return self.branches.at(group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run each group's copy on what the group's tasks see."""
        return self._on_each(lambda layer: layer, args, kwargs)

    def _on_each(self, method: Callable[[nn.Module], Any], args: Any, kwargs: Any) -> Any:
        arriving = partition_of((args, kwargs))
        partition = served(self.partition) if arriving is None else self.partition.restrict(arriving.tasks)
        results = [
            method(self.branch(group))(*within(args, group), **within(kwargs, group)) for group in partition.groups
        ]
        return self._marked(merge(partition, results), (args, kwargs))

    def _marked(self, output: Any, inputs: Any = ()) -> Any:
        if watcher():
            mark_origins(output, origins_of(inputs) | {self.layer_name})
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_copies(name):
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module):
            raise UsageError(
                f"{self.layer_name!r} is branched: all copies would share one module assigned to its {name!r}. "
                f"Assign one to each copy: for copy in layer.branches.children(): copy.{name} = ..."
            )
        else:
            self.branches.assign(name, value)

    def _is_copies(self, name: str) -> bool:
        """Whether an attribute is one of the copies', not of this module or its class."""
        branches = self.__dict__.get("_modules", {}).get("branches")
        if branches is None or name in self.__dict__ or hasattr(type(self), name):
            return False
        return all(hasattr(copy, name) for copy in branches.children())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse: only the copies have parameters."""
        raise _not_here(f"The parameter {name!r}", self.layer_name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Refuse: only the copies have buffers."""
        raise _not_here(f"The buffer {name!r}", self.layer_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "branches" not in self._modules:
                raise
        return self.attribute(name)

    def attribute(self, name: str) -> Any:
        """An attribute of the layer; a tensor reads as a fan."""
        partition = served(self.partition)
        values = [getattr(self.branch(group), name) for group in partition.groups]
        if isinstance(values[0], nn.Module):  # attention.out_proj has a weight in turn
            return Branched(f"{self.layer_name}.{name}", partition, dict(zip(partition.groups, values, strict=True)))
        if isinstance(values[0], Tensor) or not callable(values[0]):
            return self._marked(merge(partition, values))
        return lambda *args, **kwargs: self._on_each(lambda layer: getattr(layer, name), args, kwargs)


class _NoParameters(dict[str, Any]):
    """The parameters of a branched layer itself: none. Code that removes one meant those of the copies."""

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name

    def __missing__(self, name: str) -> Any:
        raise _not_here(f"The parameter {name!r}", self.layer_name)

    def __delitem__(self, name: str) -> None:
        self[name]


def _not_here(what: str, layer_name: str) -> UsageError:
    return UsageError(
        f"{what} cannot be removed, replaced or registered at {layer_name!r}, which is branched: its copies hold the "
        "parameters and buffers. Do it for each copy (prune it, or normalise its weight): "
        "for copy in layer.branches.children(): ..."
    )


class BranchedParameter(Branched):
    """A bare parameter of a container, with one copy per task group; the container's attribute reads as a fan."""

    def __init__(self, layer_name: str, partition: Partition, copies: Mapping[Group, nn.Parameter]) -> None:
        attribute = layer_name.rpartition(".")[2]
        super().__init__(layer_name, partition, {group: _Holder(attribute, copy) for group, copy in copies.items()})
        self.attribute_name = attribute

    def put_into(self, container: nn.Module) -> None:
        """Take the parameter's place in its container."""
        name = self.attribute_name
        container._parameters[name] = None  # keeps the place in the order of parameters
        container._modules[name] = self
        # A module is found only after the class's own attributes.
        operate(container, Surgery(attributes=((name, _fan_of),)))
        container.register_load_state_dict_pre_hook(LoadBareParameter(name))


def _fan_of(container: nn.Module, name: str) -> Any:
    parameter = container._modules[name]
    assert isinstance(parameter, BranchedParameter)
    return parameter.attribute(name)


class _Holder(nn.Module):
    """One group's copy of a bare parameter."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter(name, parameter)


def _load_original_into_branches(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a checkpoint of the unbranched model load: every copy gets the layer's entries."""
    assert isinstance(module, Branched)
    load_into_branches(module.branches, state_dict, prefix, lambda key: True)


def load_into_branches(
    branches: Branches, state_dict: dict[str, Any], prefix: str, belongs: Callable[[str], bool]
) -> None:
    """Move the entries of an unbranched layer that belong to its branches to every group."""
    inside = f"{prefix}branches."
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inside)]:
        name = key[len(prefix) :]
        if belongs(name):
            value = state_dict.pop(key)
            for group, _ in branches.items():
                state_dict.setdefault(f"{inside}{group}.{name}", value)


class LoadBareParameter:
    """Lets a checkpoint of the unbranched model load: the copies of a bare parameter get its entry."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Move the entry to the branches."""
        branched = module._modules.get(self.name)
        if isinstance(branched, BranchedParameter) and prefix + self.name in state_dict:
            value = state_dict.pop(prefix + self.name)
            for group, _ in branched.branches.items():
                state_dict.setdefault(f"{prefix}{self.name}.branches.{group}.{self.name}", value)
