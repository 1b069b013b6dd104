"""TaskFan: a value that differs between task groups while the model runs."""

from __future__ import annotations

import copy
import dis
import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from recon.errors import FanError
from recon.partition import Group, Partition, join, refine

# A Python number or bool read off a fan would send every group down one group's path.
_READS_VALUES = frozenset(
    "__bool__ __float__ __int__ __index__ __complex__ __contains__ __array__ "
    "item tolist numpy is_nonzero equal allclose".split()
)
_PLAIN_RESULTS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout)
_AUGMENTED = range(13, 26)  # BINARY_OP arguments that mean `+=` and its kin, from Python 3.11 on

# The tasks that the code running now serves, where it runs once per group; None: all of them.
_serving: ContextVar[Group | None] = ContextVar("serving", default=None)
# What a dry run looks out for; nobody pays for it in every step.
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


class Watcher(Protocol):
    """Is told of writes that do not mean for a branched model what they mean for the original."""

    def shared_write(self, tensor: Tensor, partition: Partition) -> bool:
        """Values that differ between groups are written into a tensor that all tasks share: is that right here?"""

    def left_behind(self, tensor: Tensor) -> None:
        """A write went into copies of a tensor: whoever still holds the tensor itself does not see it."""


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


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
        first = values[0]
        # In a dry run, a shell that wants a gradient tells on an autograd function that gets hold of it.
        grad = _watcher.get() is not None and any(value.requires_grad for value in values)
        shell = Tensor._make_wrapper_subclass(cls, (0,), dtype=first.dtype, device=first.device, requires_grad=grad)
        shell._partition = partition
        shell._by_group = list(values)
        return shell

    def __init__(self, partition: Partition, values: Sequence[Tensor]) -> None:
        pass  # all is done in __new__; Tensor's own __init__ takes no arguments

    def for_group(self, group: Group) -> Tensor:
        """The value of a group that lies within one of the fan's."""
        return self._by_group[self._partition.label_of[group[0]]]

    def restrict(self, tasks: Group) -> TaskFan:
        """The same fan for some tasks only; the other groups' values are left behind.

        Raises:
            FanError: it holds no value for any of them.
        """
        partition = self._partition.restrict(tasks)
        if not partition.tasks:
            raise FanError(f"Values computed for {list(self._partition.tasks)} are used for {list(tasks)}{where()}.")
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
        return map_groups(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise FanError(
            f"{func} was called past Python on values that differ between tasks{where()}: a compiled or scripted "
            "operator cannot map over them. Use its Python form there, or branch later layers only."
        )


def map_groups(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `call(*args, **kwargs)` for every group, with that group's values in place of the fans.

    The groups are the common refinement of the fans among the arguments. Tensors come back as fans; anything else
    must be the same for every group.

    Raises:
        FanError: the arguments have no task in common, or the results differ in something but tensors.
    """
    leaves, spec = tree_flatten((args, dict(kwargs)))
    common = common_refinement([leaf._partition for leaf in leaves if type(leaf) is TaskFan])
    watcher = _watcher.get()
    if watcher:
        _refuse_lost_gradients(leaves)
    shared = [_Shared(leaf) for leaf in leaves if _is_shared(leaf)] if watcher else []
    results = []
    for group in common.groups:
        chosen = [leaf.for_group(group) if type(leaf) is TaskFan else leaf for leaf in leaves]
        group_args, group_kwargs = tree_unflatten(chosen, spec)
        results.append(call(*group_args, **group_kwargs))
    for one in shared:
        if watcher and one.changed and not watcher.shared_write(one.tensor, common):
            _refuse_write(getattr(call, "__name__", "This"))
    return merge(common, results)


def merge(partition: Partition, results: Sequence[Any]) -> Any:
    """One structure holding fans, from one structure a group; plain where all groups share one and the same tensor.

    Raises:
        FanError: the structures, or values in them that are not tensors, differ between groups.
    """
    first = results[0]
    if isinstance(first, Tensor):
        return _fan(partition, results)
    if first is None or isinstance(first, _PLAIN_RESULTS):
        return _same(results)
    try:
        return _map(lambda *column: _fan_or_same(partition, column), *results)
    except ValueError as error:
        raise FanError(f"An operation gives a different structure for different tasks{where()}: {error}") from error


def _fan_or_same(partition: Partition, values: Sequence[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        return _fan(partition, values)
    return _same(values)


def _fan(partition: Partition, values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    if len(values) == 1:
        if partition.tasks == _serving.get():  # nothing differs between the tasks that are served here
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


def _map(call: Callable[..., Any], *structures: Any) -> Any:
    """`tree_map`, into dataclasses too: Python's own are leaves to it."""

    def visit(leaf: Any, *others: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return call(leaf, *others)
        result = copy.copy(leaf)
        for field in fields(leaf):
            value = _map(call, *(getattr(part, field.name) for part in (leaf, *others)))
            object.__setattr__(result, field.name, value)
        return result

    return tree_map(visit, *structures)


def restrict(structure: Any, tasks: Group) -> Any:
    """Any structure, its fans restricted to some tasks."""
    return _map(lambda leaf: leaf.restrict(tasks) if type(leaf) is TaskFan else leaf, structure)


def within(structure: Any, group: Group) -> Any:
    """Any structure as one group of tasks sees it: plain values wherever the group's tasks agree."""

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        inner = leaf.restrict(group)
        return inner._by_group[0] if len(inner._by_group) == 1 else inner

    return _map(pick, structure)


def value_for(structure: Any, task: str) -> Any:
    """Any structure as one task sees it: plain values where the fans were.

    Raises:
        FanError: a fan holds no value for this task.
    """

    def pick(leaf: Any) -> Any:
        if type(leaf) is not TaskFan:
            return leaf
        if _watcher.get():
            _refuse_lost_gradients([leaf])
        if task not in leaf._partition.label_of:
            raise FanError(f"The output of task {task!r} holds values computed only for {list(leaf._partition.tasks)}.")
        return leaf.for_group((task,))

    return _map(pick, structure)


def fans_in(structure: Any) -> list[TaskFan]:
    """The fans in any structure of tuples, lists, dicts and dataclasses."""
    found = [leaf for leaf in leaves_of(structure) if type(leaf) is TaskFan]
    if _watcher.get():
        _refuse_lost_gradients(found)
    return found


def leaves_of(structure: Any) -> Iterator[Any]:
    """`tree_leaves`, into dataclasses too."""
    for leaf in tree_leaves(structure):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            yield leaf


def partition_of(structure: Any) -> Partition | None:
    """The common refinement of the fans in a structure; `None` if it holds none.

    Raises:
        FanError: the fans have no task in common.
    """
    partitions = [fan._partition for fan in fans_in(structure)]
    return common_refinement(partitions) if partitions else None


def common_refinement(partitions: Sequence[Partition]) -> Partition:
    """The groups of values that meet.

    Raises:
        FanError: they have no task in common.
    """
    first = partitions[0]
    if all(p is first for p in partitions):
        return first
    common = refine(*partitions)
    if not common.tasks:
        raise FanError(
            f"Values computed for {[list(p.tasks) for p in partitions]} meet{where()}, but no task sees them all."
        )
    return common


@contextmanager
def serving(tasks: Group) -> Iterator[None]:
    """Run code for some tasks only: what it branches fans out over these, and is plain where they agree."""
    token = _serving.set(tasks)
    try:
        yield
    finally:
        _serving.reset(token)


def served(partition: Partition) -> Partition:
    """A partition, restricted to the tasks that the running code serves."""
    tasks = _serving.get()
    return partition if tasks is None else partition.restrict(tasks)


def _same(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, RemovableHandle):
        return _Handles(values)
    if all(value is first or bool(value == first) for value in values[1:]):
        return first
    raise FanError(
        f"A value that is not a tensor differs between tasks{where()}: {_short(first)} and "
        f"{_short(values[-1])}. Python can follow only one of them."
    )


def _short(value: object, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit] + "..."


class _Handles:
    """The handles of one hook, registered on every group's value."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


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
    common = common_refinement([fan._partition for fan in fans_in((args, dict(kwargs)))])
    if not plain:
        for target in fans:
            _separate(target, common)
        result = map_groups(func, args, kwargs)
        # `y.add_(x)` is y itself: aliases of the fan must go on seeing later writes.
        return written[0] if isinstance(result, TaskFan) and len(written) == 1 else result
    watcher = _watcher.get()
    if plain[0] is args[0] and _augmented_assignment():
        # `y += fan` binds the name y anew, so y may become a fan; the old tensor stays as it was.
        result = map_groups(lambda y, *a, **k: func(y.clone(), *a, **k), args, kwargs)
        if watcher:
            watcher.left_behind(plain[0])
        return result
    if watcher and all(watcher.shared_write(target, common) for target in plain):
        return map_groups(func, args, kwargs)
    return _refuse_write(name)


def _refuse_write(name: str) -> NoReturn:
    raise FanError(
        f"{name}() writes values that differ between tasks into a tensor that all tasks share{where()}. Make a new "
        "tensor instead (y = y * x for y.mul_(x); torch.cat, torch.stack or torch.where for z[i] = x), or branch "
        "later layers only."
    )


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and type(leaf) is not TaskFan and not leaf.is_inference()


class _Shared:
    """A tensor among the arguments of an operation that may write into it, whatever its name."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version
        # F.batch_norm does not count its writes; no operation writes into what requires a gradient uncounted.
        self.value = None if tensor.requires_grad else tensor.clone()

    @property
    def changed(self) -> bool:
        if self.tensor._version != self.version:
            return True
        return self.value is not None and not equal(self.value, self.tensor)


def equal(tensor: Tensor, other: Tensor) -> bool:
    """`torch.equal`, and yes for sparse tensors, which it does not take."""
    return tensor.layout != torch.strided or torch.equal(tensor, other)


def _separate(target: TaskFan, common: Partition) -> None:
    """Split a fan about to be written into the groups of `common`, no two of them sharing memory."""
    if set(common.tasks) != set(target._partition.tasks):
        raise FanError(
            f"Values of {list(common.tasks)} alone are written into values of {list(target._partition.tasks)}{where()}."
        )
    values = [target.for_group(group) for group in common.groups]
    storages = [storage_of(value) for value in values]
    target._partition, target._by_group = common, values
    if len(set(storages)) == len(storages):
        return
    held = Counter(storages)
    target._by_group = [v.clone() if held[storage] > 1 else v for v, storage in zip(values, storages, strict=True)]
    watcher = _watcher.get()
    if watcher and not _stored_back():
        for old, new in zip(values, target._by_group, strict=True):
            if old is not new:
                watcher.left_behind(old)


def storage_of(tensor: Tensor) -> int:
    """What tells tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _augmented_assignment() -> bool:
    """Whether the user's statement is `y += ...` or its kin, which only its byte code tells from `y.add_(...)`."""
    frame = _user_frame()
    if frame is None or frame.f_lasti < 0:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] in _AUGMENTED)


def _stored_back() -> bool:
    """Whether it is `x[i] += ...`, which goes on to write the result into x."""
    frame = _user_frame()
    if frame is None or not _augmented_assignment():
        return False
    code = frame.f_code.co_code
    later = (dis.opname[code[at]] for at in range(frame.f_lasti, len(code), 2))
    return next((name for name in later if name.startswith("STORE_")), "") in ("STORE_SUBSCR", "STORE_SLICE")


# Custom autograd functions --------------------------------------------------------------------------------------


def _take_over_apply() -> None:
    """Let `MyFunction.apply(fan)` map over the groups.

    `apply` hands its tensors to C++ without asking `__torch_function__`: the values would come out right, but
    without their gradient. torch has no hook there. Taking `apply` over only while a branched model runs would miss
    what activation checkpointing runs again in the backward, so it is taken over for good; calls without fans
    are passed on as they are. What slips by, the dry runs of the conversion find.
    """
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ == "_NoopSaveInputs" or not fans_in((args, kwargs)):  # checkpointing keeps its inputs by it
            return call(cls, *args, **kwargs)
        return map_groups(lambda *a, **k: call(cls, *a, **k), args, kwargs)

    def call(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        result = original.__get__(None, cls)(*args, **kwargs)
        if torch.is_grad_enabled() and any(type(leaf) is TaskFan for leaf in tree_leaves(result)):
            raise FanError(
                f"Values fan out inside {cls.__name__}{where()}, which loses their gradient. Use "
                "checkpoint(..., use_reentrant=False) if this is activation checkpointing; otherwise branch later "
                "layers only."
            )
        return result

    Function.apply = classmethod(apply)


_take_over_apply()


def _refuse_lost_gradients(leaves: Iterable[Any]) -> None:
    """Fail on what comes out of an autograd function by a name bound to its apply earlier (f = MyFunction.apply)."""
    with torch._C.DisableTorchFunctionSubclass():
        for leaf in leaves:
            if type(leaf) is TaskFan and leaf.grad_fn is not None:
                name = leaf.grad_fn.name().removesuffix("Backward")
                raise FanError(
                    f"The gradient of values that differ between tasks is lost{where()}: they come from the autograd "
                    f"function {name}, whose apply was bound to a name before recon was imported. Write "
                    f"{name}.apply(...) there."
                )


# Where in the user's code --------------------------------------------------------------------------------------

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_machinery(path: str) -> bool:
    return path.startswith(_TORCH) or os.path.dirname(path) == _HERE


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
