"""Watcher: what a dry run is told while operations map over fans; costs nothing in a training step."""

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
    """Is told of writes whose effect in a branched model may differ from that in the original."""

    def shared_write(self, tensor: Tensor, partition: Partition) -> bool:
        """Whether values that differ between groups may be written into this tensor, which all tasks share."""

    def passed_origins(self, origins: frozenset[str]) -> None:
        """An operation runs on values that fan out at these branched layers."""

    def mark_stale(self, tensor: Tensor) -> None:
        """A write went into copies of a tensor: code that still holds the tensor itself does not see it."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watcher() -> Watcher | None:
    """The watcher of the dry run that is running now; None outside a dry run."""
    return _watcher.get()


@contextmanager
def watching(by: Watcher) -> Iterator[None]:
    """Let `by` watch inside the block."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def refuse_write(name: str) -> NoReturn:
    """Refuse a write that would be wrong for all tasks but one."""
    raise FanError(
        f"{name}() writes values that differ between tasks into a tensor that all tasks share{where()}. Make a new "
        "tensor instead (y = y * x for y.mul_(x); torch.cat, torch.stack or torch.where for z[i] = x), or branch "
        "later layers only."
    )
