"""Replace several files of a folder together: afterwards all of them are the old ones, or all the new ones.

The new files are written into a temporary folder inside, `.new.RANDOM.partial`. When they are all on the disk, it is
renamed to `.saved`: this one step is the change. From then on the new files are the valid ones. They only have to be
moved up into place, which needs no space and can be repeated. A process that is killed meanwhile leaves `.saved`, and
the next one that reads or writes there moves the rest: `finish_replacing`. (Two folders can be swapped in one step on
Linux only, and a run's folder holds more than a model's files: other files stay where they are.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from recon.errors import UsageError
from recon.support.files.locks import closed, held_alone, try_hold
from recon.support.files.whole import PARTIAL, cannot_write, kind_of, make_folder, remove_left, remove_partial, sync

_SAVED, _NEW, _GONE = ".saved", ".new.", ".gone"


@contextmanager
def replacing(folder: str | Path, files: Collection[str]) -> Iterator[Path]:
    """Give an empty folder to write into; at the end of the block, its content replaces `files`, paths in the folder.

    Of these, what the block does not write anew is removed; other files stay. If the disk is full, or fails, the old
    files are unchanged.
    """
    made = not os.path.lexists(folder)
    path = make_folder(folder)
    finish_replacing(path)
    try:
        with _new_folder(path) as new:
            yield new
            _check_way(path, new)
            gone = [name for name in files if not (new / name).exists() and os.path.lexists(path / name)]
            (new / _GONE).write_text("\0".join(gone), encoding="utf-8")
            sync(new / _GONE)
            _commit(path, new)
        finish_replacing(path)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: the new files
                path.rmdir()


def finish_replacing(folder: str | Path) -> None:
    """Move the files into place that a killed writer had saved completely, but not moved yet."""
    saved = Path(folder) / _SAVED
    if not saved.is_dir():
        return
    try:
        with held_alone(saved) as is_there:
            if is_there:  # nobody else has just done it
                _move_up(saved)
    except OSError as error:
        raise cannot_write(folder, error, "finish an interrupted save in") from error


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left unfinished in a folder."""
    for left in Path(folder).glob(f"{_NEW}*{PARTIAL}"):
        remove_left(left)


def is_plumbing(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one of ours."""
    return name == _SAVED or (name.startswith(_NEW) and name.endswith(PARTIAL))


def _check_way(folder: Path, new: Path) -> None:
    """Refuse whatever blocks the place of a new file: after the change, moving must not fail."""
    for file in new.iterdir():
        remove_partial(folder / file.name)
        place = folder / file.name
        if os.path.lexists(place) and not stat.S_ISREG(mode := os.lstat(place).st_mode) and not stat.S_ISLNK(mode):
            raise UsageError(f"Cannot write {place}: it is {kind_of(mode)}. Move it, or choose another folder.")


def _commit(folder: Path, new: Path) -> None:
    while True:
        try:
            os.rename(new, folder / _SAVED)
            return
        except OSError:
            if not (folder / _SAVED).is_dir():
                raise
        finish_replacing(folder)  # another writer's, which came first


def _move_up(saved: Path) -> None:
    folder, gone = saved.parent, saved / _GONE
    if gone.exists():  # removed last: as long as it exists, all of this is repeated
        for name in filter(None, gone.read_text(encoding="utf-8").split("\0")):
            if not _lies_in(folder, name):  # a folder that somebody sent must not delete files elsewhere
                continue
            (folder / name).unlink(missing_ok=True)
            if (folder / name).parent != folder:
                with contextlib.suppress(OSError):  # other files are in there, or it is gone already
                    (folder / name).parent.rmdir()
        for file in sorted(saved.iterdir()):
            if file.name != _GONE:
                os.replace(file, folder / file.name)
        gone.unlink()
    saved.rmdir()


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a name is of a file in the folder, or in a subfolder that is not a link."""
    parts = Path(name).parts
    inner = folder / parts[0]
    return len(parts) <= 2 and ".." not in parts and not Path(name).is_absolute() and not inner.is_symlink()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    sweep(folder)
    while True:
        new = Path(tempfile.mkdtemp(prefix=_NEW, suffix=PARTIAL, dir=folder))
        if os.name == "nt":  # no locks, and no handles of folders
            handle = os.open(os.devnull, os.O_RDONLY)
            break
        handle = os.open(new, os.O_RDONLY)
        try_hold(handle)
        if new.exists():  # nobody took it for a killed writer's before we locked it
            break
        os.close(handle)
    with closed(handle):
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)
