"""Shared layers whose running statistics are kept once per task group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from recon.branching.fans.fan import TaskFan, merge
from recon.branching.fans.serving import served, serving
from recon.branching.fans.statement import where
from recon.branching.fans.trees import partition_of, within
from recon.branching.fans.value import common_refinement
from recon.branching.fans.watch import watcher
from recon.branching.modules.branched import Branches, load_into_branches
from recon.branching.modules.classes import Surgery, operate
from recon.branching.partition import Group, Partition
from recon.errors import FanError, UsageError
from recon.support.network.references import STRUCTURE
from recon.support.network.trees import leaves_of

# The attributes in which a module keeps its forward and backward hooks.
CALL_HOOKS = tuple(
    name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward", "_is_full_backward"))
)


class BranchedStatistics(nn.Module):
    """A shared layer whose buffers (running statistics) are kept once per task group: a mixin of its own class.

    The published code runs a shared BatchNorm once per task and lets the tasks overwrite one set of statistics,
    which then fits none of them. Here the layer stays what it is, with its own class, parameters and attributes, and
    each group's buffers are at `branches.<group>`. While it serves one group, it is the plain layer with that
    group's buffers; otherwise, its buffers read as fans.
    """

    branches: Branches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer once per group, on that group's statistics."""
        if "branches" not in self._modules:  # it serves one group now
            return super().forward(*args, **kwargs)
        partition = served(self.branches._partition)
        arriving = partition_of((args, kwargs))
        if arriving is not None:
            partition = common_refinement([partition, arriving])
        results, remembered, before = [], [], _attributes_of(self)
        for group in partition.groups:
            self.__dict__.update(before)  # no group starts from what another one has left
            with _plain_for(self, group), serving(group):
                results.append(self(*within(args, group), **within(kwargs, group)))
            remembered.append(_attributes_of(self))
        _remember(self, partition, before, remembered)
        return merge(partition, results)

    def __getattr__(self, name: str) -> Any:
        branches = _branches_with(self, name)
        if branches is None:
            return super().__getattr__(name)
        partition = served(branches._partition)
        return merge(partition, [branches.at(group)._buffers[name] for group in partition.groups])

    def __setattr__(self, name: str, value: Any) -> None:
        branches = _branches_with(self, name)
        if branches is None:
            super().__setattr__(name, value)
        else:
            branches.assign(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As for any module; a buffer that is kept by group is set for each group."""
        if _branches_with(self, name) is None:
            super().register_buffer(name, tensor, persistent)
        else:
            setattr(self, name, tensor)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As for any module; but ignore the branches of a module whose buffers this one has been given already."""
        if not isinstance(module, Branches):
            super().add_module(name, module)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        # From a state of an older version, the class would add buffers here that lie in the branches.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": self._version}, *args)


def keep_by_group(layer: nn.Module, partition: Partition) -> None:
    """Let a module keep its buffers once per group."""
    if hasattr(layer, "branches"):
        what = "a child" if "branches" in layer._modules else "an attribute"
        raise UsageError(
            f"{type(layer).__name__} keeps running statistics and has {what} named 'branches', which is "
            f"where recon keeps them. Rename the {what.split()[1]}."
        )
    branches = Branches(partition, {group: _Buffers(layer) for group in partition.groups})
    vars(layer)["_hooks_of_layer"] = {name: vars(layer)[name] for name in CALL_HOOKS}
    vars(layer).update({name: value for name, value in vars(nn.Module()).items() if name in CALL_HOOKS})
    vars(layer)["_buffers"] = {}
    layer.branches = branches
    operate(layer, Surgery(mixins=(BranchedStatistics,)))
    layer.register_load_state_dict_pre_hook(load_buffers)


@contextmanager
def _plain_for(layer: nn.Module, group: Group) -> Iterator[None]:
    """The layer as it was before `convert`: with its buffers, children and hooks."""
    state = layer.__dict__
    own = {name: state[name] for name in ("_buffers", *CALL_HOOKS)}
    branches = layer._modules.pop("branches")
    assert isinstance(branches, Branches)
    kept = branches.at(group)._buffers
    # All groups share what was registered since (the mask of pruning).
    buffers = {**kept, **own["_buffers"]} if own["_buffers"] else kept
    state.update(state["_hooks_of_layer"], _buffers=buffers)
    try:
        yield
    finally:
        state.update(own)
        layer._modules["branches"] = branches
        if buffers is not kept:
            for name, buffer in buffers.items():
                (kept if name in kept else layer._buffers)[name] = buffer


def _attributes_of(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in layer.__dict__.items() if name not in STRUCTURE}


def _remember(
    layer: nn.Module, partition: Partition, before: Mapping[str, Any], after: Sequence[Mapping[str, Any]]
) -> None:
    """Keep every group's tensors that the forward left in attributes (an auxiliary loss, say), not the last group's."""
    for name, value in after[-1].items():
        values = [attributes.get(name) for attributes in after]
        if value is not before.get(name) and len(values) > 1 and any(isinstance(v, Tensor) for v in leaves_of(values)):
            layer.__dict__[name] = merge(partition, values)


def plain_state(layer: BranchedStatistics) -> dict[str, Any]:
    """The attributes of the layer before `convert`, except its buffers."""
    state = {name: value for name, value in vars(layer).items() if name != "_hooks_of_layer"}
    children = {name: child for name, child in layer._modules.items() if name != "branches"}
    return {**state, **vars(layer)["_hooks_of_layer"], "_modules": children}


def _branches_with(layer: nn.Module, name: str) -> Branches | None:
    """Where a layer keeps this buffer by group; None if it does not, or while it serves one group."""
    branches = layer.__dict__.get("_modules", {}).get("branches")
    if branches is None or name not in next(branches.children())._buffers:
        return None
    assert isinstance(branches, Branches)
    return branches


class _Buffers(nn.Module):
    """A copy of a module's own buffers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, buffer in layer._buffers.items():
            persistent = name not in layer._non_persistent_buffers_set
            self.register_buffer(name, None if buffer is None else buffer.detach().clone(), persistent)


def load_buffers(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a checkpoint of the unbranched model load: every group gets the layer's buffers."""
    assert isinstance(module, BranchedStatistics)
    load_into_branches(module.branches, state_dict, prefix, lambda key: _branches_with(module, key) is not None)


# Code that swaps or changes modules by their class (see `_take_over`).


def _take_over(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """If a module is assigned a buffer that another module keeps by group, keep it by group here too.

    `convert_sync_batchnorm`, for one, replaces every norm by a new one, and assigns the old one's buffers to it.
    """
    if type(buffer) is not TaskFan or watcher():  # a dry run looks for buffers that fans are assigned to
        return
    if name not in module._buffers:
        raise FanError(
            f"Values that differ between tasks are registered as a new buffer {name!r} of {type(module).__name__}"
            f"{where()}. Register a tensor of their shape and assign them to it: it is then kept once per group."
        )
    vars(module)["_modules"].pop("branches", None)  # of the module that the buffer comes from
    keep_by_group(module, buffer._partition)
    setattr(module, name, buffer)
    vars(module)["_buffers"] = _Taken(module)


class _Taken(dict[str, Any]):
    """Drops the buffer that torch registers next: `_take_over` has assigned it already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self.module)["_buffers"] = {}


def _refuse_parameter(module: nn.Module, name: str, parameter: Tensor | None) -> None:
    if type(parameter) is TaskFan:
        raise FanError(
            f"The parameter {name!r} of a {type(module).__name__} would differ between tasks{where()}, and the layer "
            "is not branched. Branch it too, or do this before recon.convert, or to a model from recon.extract_task."
        )


register_module_buffer_registration_hook(_take_over)
register_module_parameter_registration_hook(_refuse_parameter)
