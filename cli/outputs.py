"""Checks of `--out` before hours of training, not after."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from recon.errors import UsageError

_MODEL_FILES = ("run.json", "plan.json", "weights.safetensors")
CHECKPOINT_FILE = "training.checkpoint"
METRICS_FILE = "metrics.jsonl"
RUN_MARKS = (*_MODEL_FILES, CHECKPOINT_FILE, METRICS_FILE)
"""What the folder of a run has, be it interrupted early."""


def check_file(path: Path, mark: bytes) -> Path:
    """Refuse a file that cannot be written, or one that holds something else.

    Args:
        path: where a file will be written.
        mark: what the beginning of an older such file contains: that one may be replaced.

    Raises:
        UsageError: see above.
    """
    if path.is_dir():
        raise UsageError(f"Cannot write {path}: it is a folder. Give the name of a file.")
    _check_place(path)
    if path.exists():
        with path.open("rb") as file:
            head = file.read(200)
        if head and mark not in head:
            raise UsageError(f"{path} holds something else and would be overwritten. Choose another name.")
    return path


def check_folder(folder: Path, marks: Sequence[str] = _MODEL_FILES) -> Path:
    """Refuse a folder that cannot be written to, or one with files of another kind.

    Args:
        folder: where files will be written.
        marks: an older folder with any of these files may be written into; the default is a model's or a run's.

    Raises:
        UsageError: see above.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Cannot write into {folder}: it is a file. Give the name of a folder.")
    _check_place(folder / marks[0])
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in marks):
        raise UsageError(f"{folder} holds other files, and no {' or '.join(marks)}. Choose a new or empty folder.")
    return folder


def _check_place(path: Path) -> None:
    folder = path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"Cannot write {path}: {folder} is not a folder. Choose another place to write to.")
    try:  # permissions alone do not tell: a full disk, a read-only one and /proc pass them
        os.rmdir(tempfile.mkdtemp(prefix=".recon-", dir=folder))
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}: {folder} takes no files ({error.strerror}). Choose another place to write to."
        ) from error
