"""Reading data sets as preprocessed for MTAN (github.com/lorenmt/mtan): a numpy file for each frame and field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from recon.errors import ProblemError, shortened
from recon.problems.tasks.dense import IGNORE, chosen

SPLITS = ("train", "val")

Field = Callable[[np.ndarray], np.ndarray]
"""Turns a file's array into what is kept, small. Raises a ValueError: what was wrong, and what was expected."""

Frames = dict[str, np.ndarray]
"""`{field: (frames, ...)}`."""


def folders(fields: Mapping[str, Field]) -> list[str]:
    """The folders that hold these fields."""
    return [f"{split}/{field}" for split in SPLITS for field in fields]


def read_splits(
    name: str, folder: Path, fields: Mapping[str, Field], train_samples: int | None
) -> tuple[Frames, Frames]:
    """The frames to train and to test on: `train_samples` of `train` (`dense.chosen`), and all of `val`."""
    trained, tested = (count_frames(folder / split, fields) for split in SPLITS)
    return (
        read_frames(folder / "train", fields, chosen(name, trained, train_samples)),
        read_frames(folder / "val", fields, np.arange(tested)),
    )


def count_frames(folder: Path, fields: Mapping[str, Field]) -> int:
    """How many frames a split has, whose files are `FIELD/0.npy`, `FIELD/1.npy`, ..."""
    names = {field: {path.name for path in (folder / field).glob("*.npy")} for field in fields}
    count = max(map(len, names.values()))
    missing = [f"{field}/{i}.npy" for i in range(count) for field in fields if f"{i}.npy" not in names[field]]
    if missing or not count:
        raise ProblemError(
            f"{folder} must have the files 0.npy, 1.npy, ... in each of {', '.join(fields)}, equally many in each, but "
            f"lacks {shortened(missing) or 'all'}. Unpack the preprocessed data set again."
        )
    return count


def read_frames(folder: Path, fields: Mapping[str, Field], indices: np.ndarray) -> Frames:
    """These frames of a split, in this order."""
    kept: Frames = {}
    size = None
    for row, index in enumerate(indices):
        for field, compact in fields.items():
            path = folder / field / f"{index}.npy"
            frame = _read(path, compact)
            size = size or frame.shape[-2:]
            if frame.shape[-2:] != size:
                raise ProblemError(f"{path} has {_by(frame.shape[-2:])} pixels, but other files have {_by(size)}.")
            if field not in kept:
                kept[field] = np.empty((len(indices), *frame.shape), frame.dtype)
            kept[field][row] = frame
    return kept


def _read(path: Path, compact: Field) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif":
            raise ValueError("it does not hold an array of numbers")
        return compact(array)
    except (OSError, EOFError, ValueError, MemoryError) as error:  # a header may promise any number of values
        raise ProblemError(f"Cannot read {path}: {error}.") from error


# Fields. Frames come with channels last and leave with channels first.


def image(array: np.ndarray) -> np.ndarray:
    """`(H, W, 3)`, bytes or floats from 0 to 1, to `(3, H, W)`, float16."""
    values = _floats(array, 3) / (255 if array.dtype == np.uint8 else 1)
    if values.min() < -0.5 or values.max() > 1.5:  # resizing may have left values a little outside
        raise ValueError(f"its values go from {values.min():g} to {values.max():g}, but an image's go from 0 to 1")
    return values.astype(np.float16)


def labels(classes: int) -> Field:
    """`(H, W)`, classes as numbers of any type, -1 where there is none, to the same as uint8 with `IGNORE`."""

    def compact(array: np.ndarray) -> np.ndarray:
        if array.ndim != 2:
            raise ValueError(f"it has shape {array.shape}, but it must be (H, W)")
        ignored = (array == -1) | (array == IGNORE)
        if not (ignored | np.isin(array, np.arange(classes))).all():
            raise ValueError(f"labels must be whole numbers from 0 to {classes - 1}, or -1, but not all are")
        return np.where(ignored, IGNORE, array).astype(np.uint8)

    return compact


def depth(array: np.ndarray) -> np.ndarray:
    """`(H, W, 1)` or `(H, W)`, 0 where it is not known, to `(1, H, W)`, float16."""
    values = _floats(array if array.ndim == 3 else array[..., None], 1)
    if values.min() < 0:
        raise ValueError("it has values below 0, but no depth is negative")
    return values.astype(np.float16)


def normals(array: np.ndarray) -> np.ndarray:
    """`(H, W, 3)`, unit vectors or 0 where they are not known, to `(3, H, W)`, float16."""
    values = _floats(array, 3)
    if np.abs(values).max() > 1.5:
        raise ValueError("it has values above 1, but no component of a unit vector is")
    return values.astype(np.float16)


def _floats(array: np.ndarray, channels: int) -> np.ndarray:
    if array.ndim != 3 or array.shape[-1] != channels or not array.size:
        raise ValueError(f"it has shape {array.shape}, but it must be (H, W, {channels})")
    if not np.isfinite(array).all():
        raise ValueError("it has values that are not finite")
    return np.moveaxis(array, -1, 0).astype(np.float32)


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
