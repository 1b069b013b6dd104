"""MNIST and data sets with files of its kind, read from where torchvision keeps them."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from recon.errors import ProblemError

SPLITS = {"train": "train", "test": "t10k"}
"""What the names of a split's files begin with."""

_UNSIGNED_BYTES = 8
_MOST_BYTES = 2**28  # MNIST's training images are 47 MB


def missing_files(folder: Path) -> list[Path]:
    """Those of the four files that are not in this folder, neither plain nor gzipped."""
    names = [name for split in SPLITS for name in _names(split)]
    return [folder / name for name in names if _find(folder, name) is None]


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images `(N, H, W)` and the labels `(N,)` of "train" or "test", uint8.

    Torchvision's own reader reads no gzipped file, and pads a damaged one, or fails without a reason.
    """
    images, labels = (_read(folder, name, ndim) for name, ndim in zip(_names(split), (3, 1), strict=True))
    if len(images) != len(labels):
        raise ProblemError(
            f"{folder} holds {len(images)} {split} images, but {len(labels)} labels. Download them again."
        )
    return images, labels


def _names(split: str) -> tuple[str, str]:
    return f"{SPLITS[split]}-images-idx3-ubyte", f"{SPLITS[split]}-labels-idx1-ubyte"


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read(folder: Path, name: str, ndim: int) -> np.ndarray:
    """An array of bytes: a big-endian header of magic number and shape, then the data."""
    path = _find(folder, name)
    if path is None:
        raise ProblemError(f"There is neither {folder / name} nor {name}.gz. Download one of them.")
    header, data = _unpacked(path, 4 * (1 + ndim))
    sizes = np.frombuffer(header, ">u4").tolist() if len(header) == 4 * (1 + ndim) else [None]
    if sizes[0] != 256 * _UNSIGNED_BYTES + ndim:
        raise ProblemError(f"{path} is not an idx file of bytes in {ndim} dimension(s). Download it again.")
    shape = sizes[1:]
    expected, found = math.prod(shape), len(data)
    if found != expected:
        more = "more than " if found > _MOST_BYTES else ""
        raise ProblemError(
            f"{path} should have {expected} bytes of data, {' x '.join(map(str, shape))}, but has "
            f"{more}{min(found, _MOST_BYTES)}. Download it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _unpacked(path: Path, header: int) -> tuple[bytes, bytes]:
    """The header and the data; at most one byte too many, because a small file may unpack to terabytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(header), file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three on a damaged file
        raise ProblemError(f"Cannot read {path}: {error}. Download it again, or fix its permissions.") from error
