"""Writing files so that an interrupted run leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from recon.errors import UsageError

_PARTIAL = ".partial"


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    Raises:
        UsageError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        _settle(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(path: str | Path) -> None:
    """Remove what writers of `path` left that were killed while they wrote."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        # Of map.json, not of map.json.checkpoint: the random part has no dot.
        if "." not in temporary.name.removeprefix(f".{path.name}.").removesuffix(_PARTIAL):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: _fill(temporary, text))


def write_from(path: str | Path, place: int, text: str) -> int:
    """Write text into a file from a byte on, in place of whatever is behind it; give the new end.

    Raises:
        UsageError: the file cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(place)
            file.seek(place)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise _cannot_write(path, error) from error


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents; return it.

    Raises:
        UsageError: it cannot be made, or a file is in the way.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"Cannot make the folder {path}: {error.strerror}. Choose another place to write to."
        ) from error
    return Path(path)


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _settle(path: Path) -> None:
    """Wait until the disk has the file: a machine that is switched off must not leave an empty one under its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> UsageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space, or choose another place to write to" if full else "Choose another place to write to"
    return UsageError(f"Cannot write {path}: {error.strerror}. {remedy}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
