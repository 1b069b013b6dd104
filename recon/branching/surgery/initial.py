"""Which weights a branched model starts from: the original's, a checkpoint's, or fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from recon.branching.modules.branched import Branched, BranchedParameter
from recon.branching.surgery.copies import copy_model
from recon.errors import CheckpointError, UsageError, shortened
from recon.support.files.weights import load_weights, read_state_dict

Init = Literal["copy", "scratch"] | str | Path | Mapping[str, Tensor] | Callable[[], nn.Module]


def initialise(model: nn.Module, init: Init) -> None:
    """Give an unbranched model the weights that `init` asks for; see `recon.convert`."""
    if isinstance(init, str) and init == "copy":
        return
    if isinstance(init, nn.Module):
        raise UsageError(f"init is a model ({type(init).__name__}). Pass its weights: init=pretrained.state_dict().")
    draw = _drawing(model, init)
    if draw:
        _load(model, draw(), "init")
    elif isinstance(init, Mapping):
        _load(model, init, "init")
    elif isinstance(init, (str, Path)):
        _load(model, read_state_dict(Path(init)), str(init))
    else:
        raise UsageError(
            f"init is {type(init).__name__}. Choose 'copy', 'scratch', a function that makes a fresh model, or a "
            "checkpoint of the unbranched model: a state dict, or the path of one."
        )


def draw_copies(branched: nn.Module, model: nn.Module, init: Init, copies: str) -> None:
    """Draw new weights for the second, third, ... copy of each layer, if `copies` is 'independent'."""
    if copies == "equal":
        return
    draw = _drawing(model, init)
    if copies != "independent" or draw is None:
        raise UsageError(
            f"copies is {copies!r}, with init {init if isinstance(init, (str, Path)) else type(init).__name__!r}. "
            "Choose 'equal', or 'independent' with init='scratch' or a function that makes a fresh model."
        )
    layers = [(path, part) for path, part in branched.named_modules() if isinstance(part, Branched)]
    for number in range(1, max(len(part.partition.groups) for _, part in layers)):
        state = draw()
        for path, part in layers:
            for group in part.partition.groups[number : number + 1]:
                _set_copy(part, part.branch(group), path, state)


def _set_copy(part: Branched, layer: nn.Module, path: str, state: Mapping[str, Any]) -> None:
    prefix = path.rpartition(".")[0] if isinstance(part, BranchedParameter) else path
    shared = set(part.branch(part.partition.groups[0]).parameters())  # tied to a layer that is not branched
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value not in shared:
            value.data.copy_(state[f"{prefix}.{name}" if prefix else name])


def _drawing(model: nn.Module, init: Init) -> Callable[[], Mapping[str, Any]] | None:
    """A function that draws the state of a fresh model at every call; None if `init` draws no weights."""
    if isinstance(init, str) and init == "scratch":
        return lambda: _reset(copy_model(model)).state_dict()
    return partial(_made_by, init) if callable(init) else None


def _made_by(make_model: Callable[[], nn.Module]) -> Mapping[str, Any]:
    model = make_model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"init gives {type(model).__name__}, not a model. Pass a function that makes a fresh model.")
    return model.state_dict()


def _reset(model: nn.Module) -> nn.Module:
    stuck = []
    for path, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if callable(reset):
            reset()
        else:
            stuck += own
    if stuck:
        raise UsageError(
            f"init='scratch' lets every layer draw new weights, but nothing draws {shortened(stuck)}: their modules "
            "have no reset_parameters method. Pass a function that makes a fresh model instead: init=make_model."
        )
    return model


def _load(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    try:
        load_weights(model, state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{source}: the weights do not fit this model. {_misfit(model, state)}") from error


def _misfit(model: nn.Module, state: Mapping[str, Any]) -> str:
    own = model.state_dict()
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    for path, part in model.named_modules():
        if path and part.state_dict().keys() == state.keys():
            return f"They are those of its part {path!r}: load them there before you convert (model.{path})."
    other = [key for key in own if key in state and getattr(state[key], "shape", None) != own[key].shape]
    found = {"missing": missing, "not in the model": unknown, "of another shape": other}
    parts = [f"{len(keys)} {what} ({shortened(keys, 3)})" for what, keys in found.items() if keys]
    return f"Entries: {'; '.join(parts)}. Use a checkpoint of the same architecture, unbranched."
