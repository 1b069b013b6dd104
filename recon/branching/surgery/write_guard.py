"""WriteGuard: a dry run refuses writes in place that a branched model would compute wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recon.branching.fans.compilers import refuse_full_graph
from recon.branching.fans.fan import TaskFan
from recon.branching.fans.statement import where, where_raised
from recon.branching.fans.unmappable import UNREADABLE
from recon.branching.fans.value import READ_PAST_PYTHON, origins_of
from recon.branching.fans.watch import watching
from recon.branching.partition import Partition
from recon.errors import FanError, UsageError
from recon.support.network.tensors import storage_of


class WriteGuard(TorchDispatchMode):
    """Fails where the forward reads a tensor that the original has written into, but the branched model has not.

    `x += fan` makes a new x out of a tensor that has not fanned out. The original changes the tensor itself, so that
    every other name and view of it sees the change.
    """

    def __init__(self, is_statistics: Callable[[Tensor, Partition], bool] = lambda tensor, partition: False) -> None:
        super().__init__()
        self.shared_write = is_statistics
        self.stale: dict[int, tuple[Tensor, Tensor]] = {}
        self.refusal: FanError | None = None
        self.origins: frozenset[str] = frozenset()

    def passed_origins(self, origins: frozenset[str]) -> None:
        """Keep the branched layers that the latest operation's values come from."""
        self.origins = origins
        if origins:
            refuse_full_graph()

    def mark_stale(self, tensor: Tensor) -> None:
        """Mark the tensor's elements in its storage."""
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        _, mask = self.stale.setdefault(storage_of(tensor), (tensor, torch.zeros(elements, dtype=torch.bool)))
        mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if TaskFan in types:
            self.passed_origins(origins_of((args, kwargs)))
            try:
                TaskFan.__torch_dispatch__(func, types, args, kwargs)
            except FanError as error:
                self.refusal = error
                raise
        if self.stale and not func.is_view and any(self._is_stale(leaf) for leaf in tree_leaves((args, kwargs))):
            raise FanError(
                f"This uses a tensor that an earlier statement changes in place, by values that differ between "
                f"tasks{where()}. Let that statement make a new tensor (y = y + x for y += x), or branch later layers "
                "only."
            )
        return func(*args, **(kwargs or {}))

    def _is_stale(self, leaf: object) -> bool:
        if not isinstance(leaf, Tensor) or storage_of(leaf) not in self.stale:
            return False
        marked, mask = self.stale[storage_of(leaf)]
        if leaf.itemsize != marked.itemsize:
            return True
        return bool(mask.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).any())


@contextmanager
def watch_writes(guard: WriteGuard) -> Iterator[None]:
    """Let `guard` watch inside the block; its errors say where the values fan out, and what to do."""
    try:
        with watching(guard), guard:
            yield
    except UsageError as error:
        # TorchScript turns a refusal into an error of its own.
        refusal = error if isinstance(error, FanError) else guard.refusal or _refused_read(error.__cause__)
        if refusal is None:
            raise
        raise FanError(f"{refusal} {way_out(guard.origins)}") from None


def _refused_read(error: BaseException | None) -> FanError | None:
    """The refusal behind an error of C++ code that read a fan's memory, with the user's statement."""
    if error is None or not any(words in str(error) for words in READ_PAST_PYTHON):
        return None
    return FanError(f"C++ code reads a fan's memory{where_raised(error)}. {UNREADABLE}")


def way_out(origins: Iterable[str] = ()) -> str:
    """What to do about a forward that fans cannot pass, whose values fan out at these layers."""
    layers = ", ".join(map(repr, sorted(origins)))
    where_from = f"The values fan out at {layers}. " if layers else ""
    return (
        f"{where_from}To leave the forward as it is, convert with mode='per-task' (--mode per-task): the whole network "
        "then runs once per task."
    )
