"""Read tensor files that others may have written: no code in them runs, and damage is noticed."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from recon.support.files.documents import shown

SEAL = "recon.sha256"
"""The entry of a safetensors file's metadata that holds the SHA-256 of the file, itself as zeros."""

UNSEALED = {SEAL: "0" * 64}
"""Metadata for a file that will be sealed."""

_MARK = f'"{SEAL}":"'.encode()


class TensorFileError(Exception):
    """A tensor file that must not be used; the message, a clause, says why."""


class ForeignObjectError(TensorFileError):
    """A file that holds objects other than tensors and plain values."""


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, onto the CPU: tensors and plain values, of which unpickling runs no code.

    A `ForeignObjectError` says that the file holds objects of other kinds, a `TensorFileError` that it is damaged or of
    another kind.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, TensorFileError):
        raise
    except pickle.UnpicklingError as error:
        raise ForeignObjectError("holds objects other than tensors, or is damaged") from error
    except Exception as error:  # by pickle's documentation, a damaged file may raise anything
        raise TensorFileError(f"is damaged or truncated ({type(error).__name__})") from error


def seal(path: Path) -> None:
    """Write a safetensors file's checksum into its metadata, where `UNSEALED` keeps its place."""
    with path.open("r+b") as file:
        start = _find_seal(file)
        assert start is not None  # it was written with UNSEALED
        digest = _digest(file, start)
        file.seek(start)
        file.write(digest.encode())


def check_seal(path: Path) -> None:
    """Compare a safetensors file with its checksum; older files have none.

    A `TensorFileError` says that it was changed since it was saved, a `SafetensorError` that it is damaged.
    """
    with safe_open(str(path), framework="pt") as weights:
        expected = (weights.metadata() or {}).get(SEAL)
    with path.open("rb") as file:
        start = _find_seal(file)
        if expected is None and start is None:
            return
        if expected is None or start is None or _digest(file, start) != expected:
            raise TensorFileError("is not what was saved: its checksum is another one")


def _find_seal(file: Any) -> int | None:
    """Where the checksum begins in a safetensors file: in the header, whose length the first 8 bytes give."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    place = file.read(length).find(_MARK)
    return None if place < 0 else 8 + place + len(_MARK)


def _digest(file: Any, start: int) -> str:
    """The SHA-256 of the file with zeros where the checksum is."""
    file.seek(0)
    found = hashlib.sha256(file.read(start) + UNSEALED[SEAL].encode())
    file.seek(start + len(UNSEALED[SEAL]))
    while block := file.read(2**20):
        found.update(block)
    return found.hexdigest()


def _check_archive(path: Path) -> None:
    """Compare the parts of a file of `torch.save` with their checksums, which torch.load does not.

    torch compresses nothing: parts that are could be a thousand times as large in memory as on the disk.
    """
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise TensorFileError("is a compressed archive, which torch.save does not write")
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise TensorFileError("is an archive whose parts overlap, which torch.save does not write")
        damaged = archive.testzip()
    if damaged is not None:
        raise TensorFileError(f"is damaged: {shown(damaged)} has another checksum")
