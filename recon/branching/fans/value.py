"""FanShell: how a fan holds one tensor per task group, and passes for a tensor; `fan` maps operations over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recon.branching.fans.statement import where
from recon.branching.fans.unmappable import UNREADABLE
from recon.branching.fans.watch import watcher
from recon.branching.partition import Group, Partition, refine
from recon.errors import FanError
from recon.support.network.trees import leaves_of

# A shell has no memory, and reading it would kill the process. This makes torch raise an error instead.
# torch built without CUDA lacks it. There, a shell claims a device that has no kernels (NEC's vector engines).
_refuse_reads: Callable[[Tensor, str], None] | None = getattr(torch._C, "_set_storage_access_error_msg", None)
_NO_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.VE)
READ_PAST_PYTHON = (UNREADABLE, "arguments from the 'VE' backend")
"""The error of such a read contains one of these."""


class FanShell(Tensor):
    """One tensor per task group, in the shell of a tensor that has no storage of its own.

    All fans are `TaskFan`s, which derive from this class and let operations map over the values.
    """

    _partition: Partition
    _by_group: list[Tensor]
    _origins: frozenset[str] = frozenset()  # the branched layers that the values come from, in dry runs only

    @staticmethod
    def __new__(cls, partition: Partition, values: Sequence[Tensor]) -> FanShell:
        """`values[i]` is the value of the i-th group of `partition`."""
        first = values[0]
        # In a dry run the shell requires a gradient: this shows an autograd function that gets the shell itself.
        grad = watcher() is not None and any(value.requires_grad for value in values)
        # Scripted code asks the shell itself for its shape.
        shape = first.shape if all(value.shape == first.shape for value in values) else (0,)
        keys: dict[str, Any] = {} if _refuse_reads else {"_extra_dispatch_keys": _NO_KERNELS}
        shell = Tensor._make_wrapper_subclass(
            cls, shape, dtype=first.dtype, device=first.device, requires_grad=grad, **keys
        )
        if _refuse_reads:
            _refuse_reads(shell, UNREADABLE)
        else:
            torch._C._set_throw_on_mutable_data_ptr(shell)
        shell._partition = partition
        shell._by_group = list(values)
        return shell

    def __init__(self, partition: Partition, values: Sequence[Tensor]) -> None:
        pass  # all is done in __new__; Tensor's own __init__ takes no arguments

    def for_group(self, group: Group) -> Tensor:
        """The value of a group that lies within one of the fan's."""
        return self._by_group[self._partition.label_of[group[0]]]

    def restrict(self, tasks: Group) -> FanShell:
        """The same fan for some tasks only; the other groups' values are dropped."""
        partition = self._partition.restrict(tasks)
        if not partition.tasks:
            raise FanError(f"Values computed for {list(self._partition.tasks)} are used for {list(tasks)}{where()}.")
        return type(self)(partition, [self.for_group(group) for group in partition.groups])

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


def fans_in(structure: Any) -> list[FanShell]:
    """The fans in a structure."""
    found = [leaf for leaf in leaves_of(structure) if isinstance(leaf, FanShell)]
    if watcher():
        refuse_lost_gradients(found)
    return found


def common_refinement(partitions: Sequence[Partition]) -> Partition:
    """The groups of a result computed from values with these groups."""
    first = partitions[0]
    if all(p is first for p in partitions):
        return first
    common = refine(*partitions)
    if not common.tasks:
        raise FanError(
            f"Values computed for {[list(p.tasks) for p in partitions]} meet{where()}, but no task has all of them."
        )
    return common


def origins_of(structure: Any) -> frozenset[str]:
    """The branched layers at which the values in a structure fan out; errors of a dry run name them."""
    return frozenset().union(*(leaf._origins for leaf in leaves_of(structure) if isinstance(leaf, FanShell)))


def mark_origins(structure: Any, origins: frozenset[str]) -> None:
    """Remember at which branched layers the values in a structure fan out."""
    for leaf in leaves_of(structure):
        if isinstance(leaf, FanShell):
            leaf._origins |= origins


def refuse_lost_gradients(leaves: Iterable[Any]) -> None:
    """Refuse results of an autograd function whose apply was bound to a name too early (f = MyFunction.apply)."""
    with torch._C.DisableTorchFunctionSubclass():
        for leaf in leaves:
            if isinstance(leaf, FanShell) and leaf.grad_fn is not None:
                name = leaf.grad_fn.name().removesuffix("Backward")
                raise FanError(
                    f"The gradient of values that differ between tasks is lost{where()}: they come from the autograd "
                    f"function {name}, whose apply was bound to a name before recon was imported. Write "
                    f"{name}.apply(...) there."
                )
