"""The modules that a branched model is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

import recon.autograd_functions
import recon.past_python  # noqa: F401  (makes what would read a fan's memory ask first)
from recon.errors import UsageError
from recon.fan import common_refinement, mark_origins, merge, origins_of, served, serving
from recon.fan_trees import partition_of, within
from recon.partition import Group, Partition, group_name
from recon.watch import watcher


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

    def __init__(self, layer_name: str, partition: Partition, copies: Mapping[Group, nn.Module]) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.partition = partition
        self.branches = Branches(copies)
        self.training = all(module.training for module in copies.values())
        self.register_load_state_dict_pre_hook(_load_original_into_branches)

    def branch(self, group: Group) -> nn.Module:
        """The copy that serves a group of tasks, or a part of one."""
        return self.branches.at(self.partition, group)

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

    def originals(self, key: str) -> bool:
        """Whether a state entry of the unbranched layer belongs to the branches: all of them do."""
        return True

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
        names = (*_fans_of(type(container)), name)
        container.__class__ = _class_with_fans(original_class(container), names)  # type: ignore[arg-type]
        container.register_load_state_dict_pre_hook(LoadBareParameter(name))


@lru_cache(maxsize=1024)
def _class_with_fans(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class whose attributes `names` hand out fans: a module is found only after the class's own attributes."""
    fans = {name: _fan_property(name) for name in names}
    fields = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce, "_fans": names}
    return type(cls.__name__, (cls,), {**fans, **fields})


def _fan_property(name: str) -> property:
    def fan(container: nn.Module) -> Any:  # a function: torch.compile takes no partial for one
        parameter = container._modules[name]
        assert isinstance(parameter, BranchedParameter)
        return parameter.attribute(name)

    return property(fan)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # Pickle would look for the class by its name, and find the original.
    return _new_with_fans, (original_class(module), _fans_of(type(module))), object.__reduce_ex__(module, protocol)[2]


def _new_with_fans(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = object.__new__(_class_with_fans(cls, names))  # type: ignore[arg-type]
    return module


def _fans_of(cls: type[nn.Module]) -> tuple[str, ...]:
    return vars(cls).get("_fans", ())


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before its bare parameters were branched."""
    return next(cls for cls in type(module).__mro__ if not _fans_of(cls))


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
        if "branches" in layer._modules:
            raise UsageError(
                f"{type(layer).__name__} keeps running statistics and has a child named 'branches', the name that "
                "recon keeps them under. Rename the child."
            )
        self.partition = partition
        # Not registered as a child: its parameters and children are this module's own, so that their names stay.
        object.__setattr__(self, "layer", layer)
        self._parameters = layer._parameters
        self._modules.update(layer._modules)
        self._load_state_dict_pre_hooks.update(layer._load_state_dict_pre_hooks)
        self.branches = Branches({group: _Buffers(layer) for group in partition.groups})
        self.training = layer.training
        self.register_load_state_dict_pre_hook(_load_original_into_branches)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer once per group, on that group's statistics."""
        partition = served(self.partition)
        arriving = partition_of((args, kwargs))
        if arriving is not None:
            partition = common_refinement([partition, arriving])
        results = []
        for group in partition.groups:
            with self._buffers_of(group) as layer, serving(group):
                results.append(layer(*within(args, group), **within(kwargs, group)))
        return merge(partition, results)

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
        bare = self.__dict__.get("_modules", {}).get(name)
        if isinstance(bare, BranchedParameter):  # the property that hands out the fan is its layer's
            return bare.attribute(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "branches" not in self._modules:
                raise
        if name in self.layer._buffers:
            partition = served(self.partition)
            return merge(
                partition, [self.branches.at(self.partition, group)._buffers[name] for group in partition.groups]
            )
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


class LoadBareParameter:
    """Lets a checkpoint from before the surgery load: the copies of a bare parameter get its own entry."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Move the entry to the branches."""
        branched = module._modules.get(self.name)
        if isinstance(branched, BranchedParameter) and prefix + self.name in state_dict:
            value = state_dict.pop(prefix + self.name)
            for group, _ in branched.branches.items():
                state_dict.setdefault(f"{prefix}{self.name}.branches.{group}.{self.name}", value)


def named_surgical_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Branched | BranchedStatistics]]:
    """The branched modules of a model, by every path that reaches them, outer ones first; none inside a copy."""
    for name, child in model._modules.items():
        if isinstance(child, (Branched, BranchedStatistics)):
            yield prefix + name, child
        if child is not None and not isinstance(child, Branches):
            yield from named_surgical_modules(child, f"{prefix}{name}.")


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module, those included that stand behind another and so are in nobody's `modules()`."""
    for module in model.modules():
        yield module
        if isinstance(module, BranchedStatistics):
            yield module.layer
