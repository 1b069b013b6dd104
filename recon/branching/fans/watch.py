"""What a dry run of a branched model looks out for, while operations map over fans; nobody pays for it in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn, Protocol

from torch import Tensor

from recon.branching.fans.statement import where
from recon.branching.partition import Partition
from recon.errors import FanError


class Watcher(Protocol):
    """Is told of writes that do not mean for a branched model what they mean for the original."""

    def shared_write(self, tensor: Tensor, partition: Partition) -> bool:
        """Values that differ between groups are written into a tensor that all tasks share: is that right here?"""

    def passed_origins(self, origins: frozenset[str]) -> None:
        """An operation runs on values that fan out at these branched layers."""

    def mark_stale(self, tensor: Tensor) -> None:
        """A write went into copies of a tensor: whoever still holds the tensor itself does not see it."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watcher() -> Watcher | None:
    """Who watches now; nobody outside a dry run."""
    return _watcher.get()


@contextmanager
def watching(by: Watcher) -> Iterator[None]:
    """Tell `by`."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def refuse_write(name: str) -> NoReturn:
    """Fail on a write that would be wrong for all tasks but one."""
    raise FanError(
        f"{name}() writes values that differ between tasks into a tensor that all tasks share{where()}. Make a new "
        "tensor instead (y = y * x for y.mul_(x); torch.cat, torch.stack or torch.where for z[i] = x), or branch "
        "later layers only."
    )
