"""The options of a problem, which are keyword arguments of its function, and their checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from recon.errors import UsageError

ON_THE_COMMAND_LINE = {
    "data_root": "--data-root DIR",
    "train_samples": "--train-samples N",
    "pretrained": "--pretrained FILE",
}


def check_options(spec: str, function: Any, options: Mapping[str, Any]) -> None:
    """Raise a UsageError if the function does not accept one of these options, or needs another."""
    try:
        parameters = list(inspect.signature(function).parameters.values()) if callable(function) else []
    except ValueError:  # some functions written in C do not say what they accept
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in parameters) else [n for n in options if n not in names]
    if unknown:
        accepted = f"It accepts {_list(names)}." if names else "It accepts no options."
        raise UsageError(f"{spec} does not accept {_list(unknown)}. {accepted}")
    needed = [p.name for p in named if p.default is p.empty and p.name not in options]
    if needed:
        raise UsageError(f"{spec} needs {_list(needed)}. Pass it, or give it a default where the function is defined.")


def _list(names: list[str]) -> str:
    flags = (f" ({ON_THE_COMMAND_LINE[name]})" if name in ON_THE_COMMAND_LINE else "" for name in names)
    return ", ".join(f"{name}{flag}" for name, flag in zip(names, flags, strict=True))


def check_train_samples(name: str, train_samples: int | None, batch: int) -> None:
    """Raise a UsageError if so few training samples do not fill a batch."""
    if train_samples is not None and train_samples < batch:
        raise UsageError(
            f"{name} trains on batches of {batch} samples, so {train_samples} training samples are too few. Ask for "
            f"at least {batch}."
        )


def check_available(name: str, available: int, train_samples: int | None) -> None:
    """Raise a UsageError if the data set has fewer training samples."""
    if train_samples is not None and train_samples > available:
        raise UsageError(f"{name} has {available} training samples, not {train_samples}. Ask for fewer.")
