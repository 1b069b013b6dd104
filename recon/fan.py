"""TaskFan: a value that differs between task groups while the model runs."""

from __future__ import annotations

import dis
import linecache
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from recon.errors import FanError
from recon.partition import Group, Partition, join, refine

# A Python number or bool read off a fan would send every group down one group's path.
_READS_VALUES = frozenset(
    "__bool__ __float__ __int__ __index__ __complex__ __contains__ __array__ "
    "item tolist numpy is_nonzero equal allclose".split()
)
_AUGMENTED = range(13, 26)  # BINARY_OP arguments that mean `+=` and its kin, from Python 3.11 on


class TaskFan(Tensor):
    """One tensor per task group, which any torch operation maps over.

    It is a Tensor in name only (it has no storage of its own), so that `isinstance` checks, methods and
    attributes of a user's forward work unchanged. What a fan has not reached is computed once.
    """

    _partition: Partition
    _by_group: list[Tensor]

    @staticmethod
    def __new__(cls, partition: Partition, values: Sequence[Tensor]) -> TaskFan:
        """Take `values[i]` as the value of the i-th group of `partition`."""
        shell = Tensor._make_wrapper_subclass(cls, (0,), dtype=values[0].dtype, device=values[0].device)
        shell._partition = partition
        shell._by_group = list(values)
        return shell

    def __init__(self, partition: Partition, values: Sequence[Tensor]) -> None:
        pass  # all is done in __new__; Tensor's own __init__ takes no arguments

    def for_group(self, group: Group) -> Tensor:
        """The value of a group that lies within one of the fan's."""
        return self._by_group[self._partition.label_of[group[0]]]

    def restrict(self, tasks: Group) -> TaskFan:
        """The same fan for some tasks only; the other groups' values are left behind."""
        partition = self._partition.restrict(tasks)
        return TaskFan(partition, [self.for_group(group) for group in partition.groups])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        inside = ", ".join(
            f"{'+'.join(group)}: {tuple(value.shape)}"
            for group, value in zip(self._partition.groups, self._by_group, strict=True)
        )
        return f"TaskFan({inside})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __hash__(self) -> int:
        return id(self)

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
        if name in _READS_VALUES:
            raise FanError(
                f"{name}() reads the value of a tensor that differs between tasks{where()}: Python can follow only "
                "one of the values. Use a tensor operation (torch.where, masking), or branch later layers only."
            )
        written = _written(name, args, kwargs)
        if written:
            return _map_write(func, name, written, args, kwargs)
        return map_groups(lambda group, *a, **k: func(*a, **k), None, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise FanError(
            f"{func} was called past Python on values that differ between tasks{where()}: a compiled or scripted "
            "operator cannot map over them. Use its Python form there, or branch later layers only."
        )


def map_groups(
    call: Callable[..., Any], partition: Partition | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run `call(group, *args, **kwargs)` for every group, with that group's values in place of the fans.

    The groups are the common refinement of `partition` and of the fans among the arguments. Tensors come back
    as fans; anything else must be the same for every group.

    Raises:
        FanError: the arguments have no task in common, or the results differ in something but tensors.
    """
    leaves, spec = tree_flatten((args, dict(kwargs)))
    partitions = [leaf._partition for leaf in leaves if type(leaf) is TaskFan]
    if partition is not None:
        partitions.append(partition)
    common = _refine(partitions)
    results = []
    for group in common.groups:
        chosen = [leaf.for_group(group) if type(leaf) is TaskFan else leaf for leaf in leaves]
        group_args, group_kwargs = tree_unflatten(chosen, spec)
        results.append(call(group, *group_args, **group_kwargs))
    return merge(common, results)


def merge(partition: Partition, results: Sequence[Any]) -> Any:
    """One structure holding fans, from one structure a group.

    Raises:
        FanError: the structures, or values in them that are not tensors, differ between groups.
    """
    first = results[0]
    if isinstance(first, Tensor):
        return _fan(partition, results)
    leaves, spec = tree_flatten(first)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return _same(results)
    rows = [leaves]
    for result in results[1:]:
        other_leaves, other_spec = tree_flatten(result)
        if other_spec != spec:
            raise FanError(f"An operation gives a different structure for different tasks{where()}.")
        rows.append(other_leaves)
    merged = [
        _fan(partition, column) if isinstance(column[0], Tensor) else _same(column)
        for column in zip(*rows, strict=True)
    ]
    return tree_unflatten(merged, spec)


def _fan(partition: Partition, values: Sequence[Tensor]) -> TaskFan:
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


def restrict(structure: Any, tasks: Group) -> Any:
    """Any structure, its fans restricted to some tasks."""
    return tree_map(lambda leaf: leaf.restrict(tasks) if type(leaf) is TaskFan else leaf, structure)


def within(structure: Any, group: Group) -> Any:
    """Any structure as one group of tasks sees it: plain values wherever the group's tasks agree."""

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        inner = leaf.restrict(group)
        return inner._by_group[0] if len(inner._by_group) == 1 else inner

    return tree_map(pick, structure)


def value_for(structure: Any, task: str) -> Any:
    """Any structure as one task sees it: plain values where the fans were.

    Raises:
        FanError: a fan holds no value for this task.
    """

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        if task not in leaf._partition.label_of:
            raise FanError(f"The output of task {task!r} holds values computed only for {list(leaf._partition.tasks)}.")
        return leaf.for_group((task,))

    return tree_map(pick, structure)


def fans_in(structure: Any) -> Iterator[TaskFan]:
    """The fans in any structure of tuples, lists and dicts."""
    return (leaf for leaf in tree_leaves(structure) if type(leaf) is TaskFan)


def partition_of(structure: Any) -> Partition | None:
    """The common refinement of the fans in a structure; `None` if it holds none."""
    partitions = [fan._partition for fan in fans_in(structure)]
    return refine(*partitions) if partitions else None


def _refine(partitions: Sequence[Partition]) -> Partition:
    first = partitions[0]
    if all(p is first for p in partitions):
        return first
    common = refine(*partitions)
    if not common.tasks:
        raise FanError(
            f"Values computed for {[list(p.tasks) for p in partitions]} meet{where()}, but no task sees them all."
        )
    return common


def _same(values: Sequence[Any]) -> Any:
    first = values[0]
    if all(value is first or bool(value == first) for value in values[1:]):
        return first
    raise FanError(
        f"A value that is not a tensor differs between tasks{where()}: {first!r} and {values[-1]!r}. Python can "
        "follow only one of them."
    )


# Writing in place ------------------------------------------------------------------------------------------


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


def _map_write(
    func: Callable[..., Any],
    name: str,
    written: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    fans = [target for target in written if isinstance(target, TaskFan)]
    plain = [target for target in written if not isinstance(target, TaskFan)]
    if not plain:
        common = _refine([fan._partition for fan in fans_in((args, dict(kwargs)))])
        for target in fans:
            _separate(target, common)
        result = map_groups(lambda group, *a, **k: func(*a, **k), None, args, kwargs)
        # `y.add_(x)` is y itself: aliases of the fan must go on seeing later writes.
        return written[0] if isinstance(result, TaskFan) and len(written) == 1 else result
    if _augmented_assignment() and plain[0] is args[0]:
        # `y += fan` binds the name y anew, so y may become a fan; the old tensor stays as it was.
        return map_groups(lambda group, y, *a, **k: func(y.clone(), *a, **k), None, args, kwargs)
    raise FanError(
        f"{name}() writes values that differ between tasks into a tensor that all tasks share{where()}. Make a new "
        "tensor instead (y = y * x for y.mul_(x); torch.cat, torch.stack or torch.where for z[i] = x), or branch "
        "later layers only."
    )


def _separate(target: TaskFan, common: Partition) -> None:
    """Split a fan about to be written into the groups of `common`, no two of them sharing memory."""
    if set(common.tasks) != set(target._partition.tasks):
        raise FanError(
            f"Values of {list(common.tasks)} alone are written into values of {list(target._partition.tasks)}{where()}."
        )
    seen: set[int] = set()
    values = []
    for group in common.groups:
        value = target.for_group(group)
        storage = value.untyped_storage()._cdata
        values.append(value.clone() if storage in seen else value)
        seen.add(storage)
    target._partition, target._by_group = common, values


def _augmented_assignment() -> bool:
    """Whether the user's statement is `y += ...` or its kin, which only its byte code tells from `y.add_(...)`."""
    frame = _user_frame()
    if frame is None or frame.f_lasti < 0:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] in _AUGMENTED)


# Where in the user's code --------------------------------------------------------------------------------------

_HERE = os.path.dirname(os.path.abspath(__file__))
_NOT_USER_CODE = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.join(_HERE, "fan.py"),
    os.path.join(_HERE, "surgery.py"),
)


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_USER_CODE):
        frame = frame.f_back
    return frame


def where() -> str:
    """` at file.py:12, in Block.forward: y.mul_(x)`: the user's statement that is running now."""
    frame = _user_frame()
    if frame is None:
        return ""
    code = frame.f_code
    owner = frame.f_locals.get("self")
    inside = f"{type(owner).__name__}.{code.co_name}" if isinstance(owner, nn.Module) else code.co_name
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f" at {os.path.basename(code.co_filename)}:{frame.f_lineno}, in {inside}" + (f": `{line}`" if line else "")
