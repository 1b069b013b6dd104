"""Locks: who is writing something right now. A lock ends with the process that holds it, however that ends.

The lock is the operating system's, on an open file (`flock`); where there is none (Windows, some network disks),
nothing is locked and everything else works.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recon.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_handles: set[int] = set()


@contextmanager
def written_by_us(path: str | Path, lock: Path) -> Iterator[float | None]:
    """Keep other processes from writing `path`; gives when the last writer began, if it was killed.

    `lock` is the lock file, which says who writes, in a folder that exists; removed in the end. One that a killed
    process left does not keep others from writing. An `OSError` says that it cannot be created.
    """
    if fcntl is None:
        yield None
        return
    handle, killed = _opened(path, lock)
    with closed(handle):
        with contextlib.suppress(OSError):  # a full disk: the lock works all the same
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield killed
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def try_hold(handle: int) -> bool:
    """Lock an open file if nobody else has; returns whether we hold the lock now, or there are no locks here."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the disk has no locks
        return True
    return True


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock of this file or folder."""
    if fcntl is None:
        return False
    with closed(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as handle:
        return not try_hold(handle)


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Wait until nobody else holds the folder; gives whether it still exists then."""
    if fcntl is None:
        yield folder.is_dir()
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    with closed(handle):
        with contextlib.suppress(OSError):  # the disk has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield _is_at(handle, folder)


@contextmanager
def closed(handle: int) -> Iterator[int]:
    """Close an open file in the end, which releases its lock."""
    if fcntl is None:  # Windows renames and removes no file that is open
        os.close(handle)
        yield handle
        return
    _handles.add(handle)
    try:
        yield handle
    finally:
        _handles.discard(handle)
        os.close(handle)


def _opened(path: str | Path, lock: Path) -> tuple[int, float | None]:
    while True:
        was_there = lock.exists()
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not try_hold(handle):
            with closed(handle):
                who = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            raise UsageError(
                f"{path} is being written by {who}. Wait until it is done, or choose another place to write to."
            )
        # The last holder may have removed the file just after we opened it.
        if _is_at(handle, lock):
            return handle, os.fstat(handle).st_mtime if was_there else None
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    return os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path))


def _let_go() -> None:
    """A data loader's worker, forked from this process, must not hold its locks when it is gone."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
