"""Options of a problem: keyword arguments of the function that makes it."""

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
    """See that a problem's function can be called with these options.

    Raises:
        UsageError: it does not take one of them, or needs one that is not among them.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values()) if callable(function) else []
    except ValueError:  # some functions written in C do not say what they take
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in parameters) else [n for n in options if n not in names]
    if unknown:
        takes = f"It takes {_list(names)}." if names else "It takes no options."
        raise UsageError(f"{spec} does not take {_list(unknown)}. {takes}")
    needed = [p.name for p in named if p.default is p.empty and p.name not in options]
    if needed:
        raise UsageError(f"{spec} needs {_list(needed)}. Pass it, or give it a default where the function is defined.")


def _list(names: list[str]) -> str:
    flags = (f" ({ON_THE_COMMAND_LINE[name]})" if name in ON_THE_COMMAND_LINE else "" for name in names)
    return ", ".join(f"{name}{flag}" for name, flag in zip(names, flags, strict=True))
