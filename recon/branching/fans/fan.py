"""TaskFan: a value that differs between task groups, and how torch's operations map over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from recon.branching.fans.packing import map_packing
from recon.branching.fans.serving import tasks_served
from recon.branching.fans.statement import where
from recon.branching.fans.unmappable import refuse_past_python, refuse_unmappable
from recon.branching.fans.value import FanShell, common_refinement, mark_origins, origins_of, refuse_lost_gradients
from recon.branching.fans.watch import refuse_write, watcher
from recon.branching.fans.writes import map_write
from recon.branching.partition import Partition, join
from recon.errors import FanError
from recon.support.files.documents import shown
from recon.support.network.tensors import SharedTensor
from recon.support.network.trees import map_tree

_PLAIN_RESULTS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout)

_LEAVES = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, Tensor, torch.nn.Parameter))


class TaskFan(FanShell):
    """One tensor per task group, which any torch operation maps over.

    It is a Tensor in name only (it has no storage of its own), so that `isinstance` checks, methods and
    attributes of a user's forward work unchanged. Operations without a fan among their arguments run once.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        watch = watcher()
        if watch:
            watch.passed_origins(origins_of((args, kwargs)))
        refuse_unmappable(name)
        written = _written(name, args, kwargs)
        if written:
            return map_write(map_groups, func, name, written, args, kwargs)
        if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
            return map_packing(map_groups, func, args, kwargs)
        return map_groups(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        refuse_past_python(func)


def map_groups(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `call(*args, **kwargs)` for every group, with that group's values in place of the fans.

    The groups are the common refinement of the fans among the arguments. Tensors come back as fans; anything else
    must be the same for every group.
    """
    watch = watcher()
    if not watch and all(map(_is_leaf, args)) and all(map(_is_leaf, kwargs.values())):
        return _map_leaves(call, args, kwargs)
    leaves, spec = tree_flatten((args, dict(kwargs)))
    common = common_refinement([leaf._partition for leaf in leaves if type(leaf) is TaskFan])
    if watch:
        watch.passed_origins(origins_of(leaves))
        refuse_lost_gradients(leaves)
    shared = [SharedTensor(leaf) for leaf in leaves if _is_shared(leaf)] if watch else []
    results = []
    for group in common.groups:
        chosen = [leaf.for_group(group) if type(leaf) is TaskFan else leaf for leaf in leaves]
        group_args, group_kwargs = tree_unflatten(chosen, spec)
        results.append(call(*group_args, **group_kwargs))
    for one in shared:
        if watch and one.changed and not watch.shared_write(one.tensor, common):
            refuse_write(getattr(call, "__name__", "This"))
    merged = merge(common, results)
    if watch:
        mark_origins(merged, origins_of(leaves))
    return merged


def _map_leaves(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`map_groups` for calls without nested arguments: most of them, and pytree would take half of their time."""
    common = common_refinement([leaf._partition for leaf in (*args, *kwargs.values()) if type(leaf) is TaskFan])
    results = []
    for group in common.groups:
        group_args = [arg.for_group(group) if type(arg) is TaskFan else arg for arg in args]
        group_kwargs = {k: arg.for_group(group) if type(arg) is TaskFan else arg for k, arg in kwargs.items()}
        results.append(call(*group_args, **group_kwargs))
    return merge(common, results)


def _is_leaf(value: Any) -> bool:
    if type(value) in (tuple, list):  # a stride, a shape
        return all(type(item) is int for item in value)
    return type(value) in _LEAVES or type(value) is TaskFan


def merge(partition: Partition, results: Sequence[Any]) -> Any:
    """Merge one structure per group into one that holds fans; plain where all groups share the same tensor."""
    first = results[0]
    if isinstance(first, Tensor):
        return _fan(partition, results)
    if first is None or isinstance(first, _PLAIN_RESULTS):
        return _same(results)
    try:
        return map_tree(lambda *column: _fan_or_same(partition, column), *results)
    except ValueError as error:
        raise FanError(f"An operation returns a different structure for different tasks{where()}: {error}") from error


def _fan_or_same(partition: Partition, values: Sequence[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        return _fan(partition, values)
    return _same(values)


def _fan(partition: Partition, values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    if len(values) == 1:
        if partition.tasks == tasks_served():  # nothing differs between the tasks that are served here
            return first
    elif all(value is first for value in values):
        return first
    if not any(type(value) is TaskFan for value in values):
        return TaskFan(partition, values)
    # A group's value may itself have fanned out over the group's tasks: one flat fan holds them all.
    parts = [
        value._partition if type(value) is TaskFan else Partition(group, (0,) * len(group))
        for group, value in zip(partition.groups, values, strict=True)
    ]
    flat = join(partition, parts)
    flat_values = []
    for group in flat.groups:
        value = values[partition.label_of[group[0]]]
        flat_values.append(value.for_group(group) if type(value) is TaskFan else value)
    return TaskFan(flat, flat_values)


def _same(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, RemovableHandle):
        return _Handles(values)
    if all(value is first or bool(value == first) for value in values[1:]):
        return first
    raise FanError(
        f"A value that is not a tensor differs between tasks{where()}: {shown(first)} and "
        f"{shown(values[-1])}. Python can follow only one of them."
    )


class _Handles:
    """The handles of one hook, registered on every group's value."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call changes in place."""
    in_place = (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("__setitem__", "__set__")
        or (name.startswith("__i") and name not in ("__invert__", "__iter__", "__init__"))
        or kwargs.get("inplace") is True
    )
    targets = tree_leaves(args[0]) if in_place and args else []
    targets += tree_leaves(kwargs.get("out"))
    return [target for target in targets if isinstance(target, Tensor)]


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and type(leaf) is not TaskFan and not leaf.is_inference()
