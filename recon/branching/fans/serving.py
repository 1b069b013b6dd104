"""Which tasks the running code serves, while a module runs once per group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from recon.branching.partition import Group, Partition

_serving: ContextVar[Group | None] = ContextVar("serving", default=None)


def tasks_served() -> Group | None:
    """The tasks that the running code serves; None means all."""
    return _serving.get()


@contextmanager
def serving(tasks: Group) -> Iterator[None]:
    """Run code for some tasks only: its fans cover only these, and are plain tensors where these tasks agree."""
    token = _serving.set(tasks)
    try:
        yield
    finally:
        _serving.reset(token)


def served(partition: Partition) -> Partition:
    """A partition, restricted to the tasks that the running code serves."""
    tasks = _serving.get()
    return partition if tasks is None else partition.restrict(tasks)
