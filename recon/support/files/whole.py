"""Writing files so that an interrupted run leaves the old one or the new one, never half of one.

A file is written under another name beside the one that it replaces, `.NAME.RANDOM.partial`, and renamed when the
disk has all of it. The next writer of NAME removes what a killed one left. Symbolic links stay: what they point to is
written. Only regular files are ever replaced. For several files that belong together, see
`recon.support.files.folders`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recon.errors import ReconError, UsageError, WriteError
from recon.support.files.locks import LOCK, closed, is_held, try_hold, written_by_us

PARTIAL = ".partial"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place."""
    target = target_of(path)
    make_folder(target.parent)
    remove_partial(target)
    try:
        with temporary_file(target) as temporary:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise cannot_write(path, error) from error


def target_of(path: str | Path) -> Path:
    """The regular file (or the free place) that `path` writes to: itself, or what a symbolic link points to."""
    mode = mode_of(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise UsageError(f"Cannot write {path}: it is {kind_of(mode)}. Give the name of a file.")
    return Path(os.path.realpath(path))


def mode_of(path: str | Path) -> int | None:
    """The mode of what lies there, links followed; None if nothing does."""
    if "\0" in str(path):
        raise UsageError(f"Cannot write {str(path)!r}: a name cannot contain the character NUL.")
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.islink(path):
            return None
        raise UsageError(
            f"Cannot write {path}: it is a symbolic link to {os.readlink(path)}, which does not exist. Create that, "
            "remove the link, or choose another name."
        ) from None
    except NotADirectoryError:
        return None  # making the folder will say which part is not one
    except OSError as error:
        raise cannot_write(path, error) from error


def kind_of(mode: int) -> str:
    """The kind of file that a mode means, for a message."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, locked while it is in use, and removed in the end."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        try_hold(handle)
        if os.path.exists(name):  # nobody took it for a killed writer's before we locked it
            break
        os.close(handle)
    try:
        with closed(handle):
            yield Path(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def remove_partial(path: str | Path) -> None:
    """Remove what killed writers of `path` left; the file of one that is still running stays."""
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        # Of map.json, not of map.json.checkpoint: the random part has no dot.
        if "." not in left.name.removeprefix(f".{path.name}.").removesuffix(PARTIAL):
            remove_left(left)


def remove_left(left: Path) -> None:
    """Remove a killed writer's file or folder, unless the writer is still running or we lack the permission."""
    with contextlib.suppress(OSError):
        if is_held(left):
            return
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


@contextmanager
def written_alone(path: str | Path, lock: Path | None = None) -> Iterator[float | None]:
    """Keep other processes from writing there; gives when the last writer began, if it was killed.

    The lock file is `lock`, in a folder that exists, or lies beside `path`.
    """
    if lock is None:
        target = target_of(path)
        lock = make_folder(target.parent) / f".{target.name}{LOCK}"
    with contextlib.ExitStack() as stack:
        try:
            killed = stack.enter_context(written_by_us(path, lock))
        except OSError as error:
            raise cannot_write(path, error) from error
        yield killed


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; see `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_from(path: str | Path, place: int, text: str) -> int:
    """Write text into a file from a byte on, in place of what follows there; returns the new end."""
    target = target_of(path)
    make_folder(target.parent)
    try:
        with target.open("r+b" if target.exists() else "wb") as file:
            file.truncate(place)
            file.seek(place)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents; return it."""
    mode_of(path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error, "make the folder") from error
    return Path(path)


def sync(path: Path) -> None:
    """Wait until the file is on the disk: a machine that is switched off must not leave an empty one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cannot_write(path: str | Path, error: OSError, what: str = "write") -> ReconError:
    """The error to raise: a wrong path is the caller's mistake, a full disk is not."""
    reason = error.strerror or str(error)
    path = Path(*(part for part in Path(path).parts if not part.endswith(PARTIAL)))  # the name that users know
    if error.errno not in _OF_THE_DISK:
        return UsageError(f"Cannot {what} {path}: {reason}. Choose another place to write to.")
    remedy = "Free some space, or choose another place to write to" if error.errno in _FULL else "Try another disk"
    return WriteError(f"Cannot {what} {path}: {reason}. {remedy}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
