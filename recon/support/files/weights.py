"""Weights on disk: safetensors files, and state dicts of unbranched models in any kind of file."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from recon.errors import CheckpointError
from recon.support.files.folders import finish_replacing
from recon.support.files.tensors import UNSEALED, ForeignObjectError, TensorFileError, check_seal, read_tensors, seal
from recon.support.files.whole import write_atomically

WEIGHTS_FILE = "weights.safetensors"


def save_weights(model: nn.Module, path: Path, plan: str) -> None:
    """Write a model's weights, and the text of its plan beside them in the same file."""

    def write(temporary: Path) -> None:
        try:
            save_model(model, str(temporary), metadata={"plan": plan, **UNSEALED})
        except SafetensorError as error:
            raise _disk_error(error) or error from None
        seal(temporary)

    write_atomically(path, write)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file: the plan, and which tied tensors stand for which."""
    try:
        with safe_open(str(path), framework="pt") as weights:
            return weights.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}). Save the model again.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file.

    Tied tensors are saved once; the metadata says which entry stands for the others. (safetensors' load_model
    refuses a BatchNorm that has two names: torch does not count its num_batches_tracked as missing.)
    """
    metadata = read_metadata(path)
    try:
        check_seal(path)
    except TensorFileError as error:
        raise CheckpointError(
            f"{path} {error}. Save the model again, or get the file again; weights that you changed yourself are saved "
            "by recon.save."
        ) from error
    state = load_file(str(path))
    return state | {name: state[kept] for name, kept in metadata.items() if kept in state}


def load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """`model.load_state_dict`, strictly, of a state that may have lost torch's record of module versions."""
    if not hasattr(state, "_metadata"):  # MNASNet, for one, believes that such a state is of an older version
        state = OrderedDict(state)
        state._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """The state dict of an unbranched model.

    The path is that of a folder that `recon.save` wrote, a safetensors file, or a file that `torch.save` wrote: a state
    dict, or a training checkpoint that holds one under `state_dict` or `model`.
    """
    if path.is_dir():
        finish_replacing(path)
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}. Pass a file of a state dict (.pt, .safetensors), or a folder that recon.save "
            "wrote."
        )
    if path.suffix == ".safetensors":
        if read_metadata(path).get("plan"):
            raise CheckpointError(
                f"{path} holds a branched model, but a checkpoint of the unbranched model is needed. To go on from "
                "a branched one, use recon.load."
            )
        return read_weights(path)
    try:
        return _state_dict_in(read_tensors(path), path)
    except ForeignObjectError as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict: it is not one, or holds objects other than tensors (such as a "
            "whole model). Save one by torch.save(model.state_dict(), path)."
        ) from error
    except TensorFileError as error:
        raise CheckpointError(f"{path} cannot be read as a state dict: it {error}. Save it again.") from error


def _disk_error(error: SafetensorError) -> OSError | None:
    """What safetensors says of a disk in words alone: "I/O error: No space left on device (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _state_dict_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    found = content
    if isinstance(content, Mapping):
        found = next(
            (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content
        )
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        kind = f"a dict of {', '.join(map(repr, list(content)[:6]))}" if isinstance(content, Mapping) else None
        raise CheckpointError(
            f"{path} holds {kind or type(content).__name__}, not a state dict. Save one by "
            "torch.save(model.state_dict(), path), alone or under 'state_dict' or 'model'."
        )
    if all(key.startswith("module.") for key in found):  # saved from within DistributedDataParallel
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return found
