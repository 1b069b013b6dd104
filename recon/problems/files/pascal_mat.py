"""The .mat files of PASCAL-Context and PASCAL-Part: a class for each pixel, and the parts of humans."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.io import loadmat

from recon.errors import ProblemError

PARTS = {
    part: number
    for number, parts in enumerate(
        (
            "hair head lear lebrow leye mouth nose rear rebrow reye",
            "neck torso",
            "luarm ruarm",
            "lhand llarm rhand rlarm",
            "luleg ruleg",
            "lfoot llleg rfoot rlleg",
        ),
        start=1,
    )
    for part in parts.split()
}
"""PASCAL-Part's 24 parts of a human as six: head, torso, upper arms, lower arms, upper legs, lower legs."""

_PERSON = 15
_COMPRESSED = 15  # the kind of a compressed element
_MOST_BYTES = 2**28
_MOST_RATIO = 1032  # zlib compresses no better


def read_label_map(path: Path) -> np.ndarray:
    """PASCAL-Context's classes, from 1 to 459, `(H, W)`."""
    return _read(path, lambda content: content["LabelMap"])


def read_human_parts(path: Path) -> np.ndarray | None:
    """The parts of all humans of an image, 0 where there are none, `(H, W)`, uint8; None if no part is annotated."""
    return _read(path, lambda content: _paint(content["anno"][0, 0]["objects"].flat))


def _paint(objects: Any) -> np.ndarray | None:
    painted = None
    for thing in objects:
        if thing["class_ind"].item() != _PERSON:
            continue
        for part in thing["parts"].flat:
            mask = part["mask"].astype(bool)
            painted = np.zeros(mask.shape, np.uint8) if painted is None else painted
            painted[mask] = PARTS[part["part_name"].item()]
    return painted if painted is not None and painted.any() else None


def _read(path: Path, find: Any) -> Any:
    try:
        _check_size(path)
        return find(loadmat(path))
    except Exception as error:  # scipy lets a damaged file raise anything
        raise ProblemError(f"Cannot read {path}: {type(error).__name__}: {error}. Unpack it again.") from error


def _check_size(path: Path) -> None:
    """Raise a ValueError if the file's compressed elements unpack to more than `_MOST_BYTES`.

    The elements follow a header of 128 bytes, each with 8 bytes that give its kind and its size (MathWorks, "MAT-File
    Format", level 5).
    """
    if path.stat().st_size * _MOST_RATIO <= _MOST_BYTES:
        return
    content = path.read_bytes()
    order: Literal["little", "big"] = "little" if content[126:128] == b"IM" else "big"
    place, size = 128, 0
    while place + 8 <= len(content):
        kind, length = (int.from_bytes(content[i : i + 4], order) for i in (place, place + 4))
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(content[place + 8 : place + 8 + length], _MOST_BYTES + 1)
            size += len(unpacked)
        place += 8 + length
    if size > _MOST_BYTES:
        raise ValueError(f"it unpacks to more than {_MOST_BYTES} bytes")
