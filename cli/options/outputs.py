"""`--out`: checked before hours of training, not after, and then reserved for one command."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recon.errors import UsageError
from recon.experiments.training.run_folder import CHECKPOINT_FILE, METRICS_FILE, MODEL_FILES
from recon.support import launch
from recon.support.files import whole
from recon.support.files.folders import finish_replacing, is_plumbing, sweep
from recon.support.files.locks import LOCK

_SIGNS = {
    "run.json": b'"recon run"',
    "plan.json": b'"recon branch plan"',
    "weights.safetensors": b'"plan"',  # in the metadata, also of a plain model
    CHECKPOINT_FILE: b"PK",
    METRICS_FILE: b'"losses"',
}
"""What only recon's files of these names contain, within their first bytes."""
_HEAD = 1 << 16


def check_file(path: Path, mark: bytes) -> Path:
    """Refuse a file that cannot be written, or one without `mark` near its beginning: it holds something else."""
    target = whole.target_of(path)
    _check_place(path, target)
    try:
        if target.exists():
            with target.open("rb") as file:
                head = file.read(200)
            if head and mark not in head:
                raise UsageError(f"{path} holds something else and would be overwritten. Choose another name.")
    except OSError as error:
        raise whole.cannot_write(path, error) from error
    return path


def check_folder(folder: Path, marks: Sequence[str] = MODEL_FILES) -> Path:
    """Refuse a folder that cannot be written to, or one with files of another kind: with none of `marks`."""
    mode = whole.mode_of(folder)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UsageError(f"Cannot write into {folder}: it is {whole.kind_of(mode)}. Give the name of a folder.")
    _check_place(folder / marks[0], Path(os.path.realpath(folder)) / marks[0])
    try:
        others = mode is not None and any(file.name != LOCK and not is_plumbing(file.name) for file in folder.iterdir())
    except OSError as error:
        raise whole.cannot_write(folder, error, "look into") from error
    if others and not any((folder / name).exists() for name in marks):
        raise UsageError(f"{folder} holds other files, and no {' or '.join(marks)}. Choose a new or empty folder.")
    for name in marks:
        _check_sign(folder / name)
    return folder


def _check_sign(file: Path) -> None:
    if file.name not in _SIGNS or not file.is_file():
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError as error:
        raise whole.cannot_write(file, error, "look into") from error
    if head and _SIGNS[file.name] not in head:
        raise UsageError(
            f"{file} was not written by recon, and would be overwritten. Move it, or choose another folder."
        )


@contextmanager
def claimed_file(path: Path, mark: bytes) -> Iterator[bool]:
    """Check a file as `check_file` does, and keep other processes from writing it in this block.

    Gives whether the last writer was killed before it replaced the file.
    """
    check_file(path, mark)
    target = whole.target_of(path)
    with _claimed(path, target.parent, target.with_name(f".{target.name}{LOCK}")) as killed:
        if launch.number() == 0:
            whole.remove_partial(target)
        yield _is_older(target, killed)


@contextmanager
def claimed_folder(folder: Path, marks: Sequence[str] = MODEL_FILES) -> Iterator[bool]:
    """Check a folder as `check_folder` does, and keep other processes from writing into it in this block.

    Gives whether the last writer was killed before it replaced what is in there.
    """
    if launch.number() == 0 and whole.mode_of(folder) is not None:
        finish_replacing(folder)
    check_folder(folder, marks)
    with _claimed(folder, folder, folder / LOCK) as killed:
        if launch.number() == 0:
            sweep(folder)
        yield _is_older(folder / marks[0], killed)


@contextmanager
def _claimed(path: Path, folder: Path, lock: Path) -> Iterator[float | None]:
    """Of several processes, the first one writes."""
    if launch.number():
        yield None
        return
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        whole.make_folder(folder)
        with whole.written_alone(path, lock) as killed:
            yield killed
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it was not made after all, or holds something now
                each.rmdir()


def _is_older(path: Path, begun: float | None) -> bool:
    return begun is not None and path.exists() and path.stat().st_mtime < begun


def _check_place(path: Path, target: Path) -> None:
    folder = target.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        named = path.parent if folder == target.parent else folder
        raise UsageError(f"Cannot write {path}: {named} is not a folder. Choose another place to write to.")
    try:
        # The temporary file beside it has a longer name.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder / f".{target.name}.checkpoint.partial-12345678")
        # Permissions are not enough: a full disk, a read-only one and /proc pass them.
        os.rmdir(tempfile.mkdtemp(prefix=".recon-", dir=folder))
    except OSError as error:
        reason = whole.cannot_write(path, error)
        raise type(reason)(f"{reason} (No file can be made in {folder}.)") from error
