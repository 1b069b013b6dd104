"""save and load: a model on disk, branched or not, as a readable plan beside plain weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from recon.branching.conversion import convert
from recon.branching.modules.rotations import NAME, attach_rotations
from recon.branching.plan import BranchPlan, find_plan
from recon.branching.plan_file import plan_from_json, plan_to_json
from recon.branching.surgery.copies import copy_model
from recon.errors import CheckpointError, ReconError, UsageError, reason_of, type_name
from recon.support.files.folders import finish_replacing, replacing
from recon.support.files.weights import WEIGHTS_FILE, load_weights, read_metadata, read_weights, save_weights
from recon.support.files.whole import write_text
from recon.support.network.layers import unwrapped

PLAN_FILE = "plan.json"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write `weights.safetensors`, and `plan.json` for a branched model: both, or neither if that fails.

    `load` has its arguments the other way round: `save(model, folder)`, `load(folder, model)`. By keyword, they go in
    any order.

    Args:
        model: branched by `recon.convert`, or a plain model; the wrappers of DistributedDataParallel and torch.compile
            are left out.
        folder: made if it does not exist; an older model in it is replaced, other files stay.

    Raises:
        UsageError: the folder cannot be written to, or an argument has the wrong type.
        WriteError: the disk is full, or failed; an older model is unchanged.
    """
    _check_arguments(folder, model, "recon.save needs a model and a folder", "recon.save(model, 'branched/')")
    model = unwrapped(model)  # else names begin with module. or _orig_mod. and fit no plain model
    plan = find_plan(model)
    text = plan_to_json(plan) if plan else ""
    with replacing(folder, (WEIGHTS_FILE, PLAN_FILE)) as new:
        # The weights hold the plan too, so that files of two different saves are noticed.
        save_weights(model, new / WEIGHTS_FILE, text)
        if text:
            write_text(new / PLAN_FILE, text)


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The model that `save` wrote: `load("branched/", Net())`, or `load(model=Net(), folder="branched/")`.

    Args:
        folder: what `save` wrote.
        model: the unbranched architecture; it is left untouched.

    Raises:
        CheckpointError: files are missing, damaged, of two different saves, or of another architecture.
        UsageError: an argument has the wrong type.
    """
    needs = "recon.load needs a folder and an unbranched model"
    _check_arguments(folder, model, needs, "recon.load('branched/', Net())")
    folder = Path(folder)
    text = _metadata(folder).get("plan", "")
    if not text:
        loaded = copy_model(model)
    else:
        plan = plan_from_json(_read_plan(folder, text), str(folder / PLAN_FILE))
        try:
            loaded = convert(model, plan)
        except ReconError as error:
            raise CheckpointError(f"{folder}: the plan does not fit this model. {error}") from error
    try:
        _load_weights(loaded, folder)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit this model ({reason_of(error, 300)}). Load it with the "
            "architecture it was saved from."
        ) from error
    return loaded


def load_plan(folder: str | Path) -> BranchPlan:
    """The plan of the branched model that `save` wrote.

    Raises:
        CheckpointError: files are missing, damaged or of two different saves, or the model is not branched.
    """
    folder = Path(folder)
    text = _metadata(folder).get("plan", "")
    if not text:
        raise CheckpointError(f"{folder} holds a plain model, which has no plan. Pass the folder of a branched one.")
    return plan_from_json(_read_plan(folder, text), str(folder / PLAN_FILE))


def _load_weights(model: nn.Module, folder: Path) -> None:
    state = read_weights(folder / WEIGHTS_FILE)
    if any(key.startswith(f"{NAME}.") for key in state):
        attach_rotations(model)
    load_weights(model, state)
    untied = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key].to(value))]
    if untied:
        raise RuntimeError(f"{', '.join(untied[:4])} hold the same weights in this model, but not in the file")


def _check_arguments(folder: object, model: object, needs: str, example: str) -> None:
    if not isinstance(model, nn.Module) or not isinstance(folder, (str, PathLike)):
        raise UsageError(f"{needs}, but got {type_name(folder)} and {type_name(model)}. Write {example}.")


def _metadata(folder: Path) -> dict[str, str]:
    finish_replacing(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS_FILE}: no model was saved there. Pass the folder that `recon convert`, "
            "`recon train` or recon.save wrote."
        )
    return read_metadata(folder / WEIGHTS_FILE)


def _read_plan(folder: Path, text: str) -> str:
    try:
        readable = (folder / PLAN_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder / PLAN_FILE} cannot be read ({error.strerror}). Save the model again."
        ) from error
    if readable.replace(b"\r\n", b"\n") != text.encode():
        raise CheckpointError(
            f"{folder / PLAN_FILE} is not the plan that {WEIGHTS_FILE} was saved with. Editing the file does not "
            "change the plan: convert and save the model again."
        )
    return text
