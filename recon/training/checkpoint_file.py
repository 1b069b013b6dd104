"""The checkpoint of a training: one file of tensors and plain values, whole or not there at all."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recon.errors import CheckpointError, cut
from recon.support.files.tensors import TensorFileError, read_tensors
from recon.support.files.whole import write_atomically

FORMAT = "recon training checkpoint"
VERSION = 1


def write_training(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: where that fails, an older one is as it was."""
    content = {"format": FORMAT, "version": VERSION, **state}
    write_atomically(path, lambda temporary: _write(temporary, content))


def read_training(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU."""
    try:
        content = read_tensors(path)
    except (OSError, TensorFileError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the checkpoint of a training: it is damaged, truncated or something else. "
            "Delete it to start over."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not the checkpoint of a training, which `recon profile` or recon.train(checkpoint=...) writes. "
            "Give the path of one, or of a file that does not exist yet."
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r}, but this recon reads version {VERSION}. Resume with the "
            "recon that wrote it, or delete it to start over."
        )
    return content


def check_same(path: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another training: each field of what it belongs to must be the same."""
    for field in [*present, *(field for field in saved if field not in present)]:
        then, now = (_text(known[field]) if field in known else "not there" for known in (saved, present))
        if then != now:
            raise CheckpointError(
                f"{path} belongs to another training: {field} is {now} now, but was {then}. Resume with what it was, "
                "or delete the file to start over."
            )


def _text(value: Any) -> str:
    return "not given" if value is None else str(value)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
        # Find out now, not at the resume, that a safe torch.load refuses what torch.save accepted.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            "This training cannot be kept in a checkpoint: the state_dict of the model, the optimizer, the scheduler, "
            "the method or the loader, or the settings, hold something other than tensors, numbers, strings, lists and "
            f"dicts ({_first_sentence(error)})."
        ) from error
    except RuntimeError as error:  # torch's writer stumbles over the place in the file that it could not write
        raise _disk_error(error) or error from None


def _disk_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return cut(text[max(0, text.find("Unsupported")) :].partition(" was not ")[0], 160)
