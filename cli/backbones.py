"""Other networks for a problem: `--backbone`, and recon's own that `--model` names. Nothing here imports torch."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recon import models, problems
from recon.errors import UnknownNameError
from recon_cli.parsing import problem_options

if TYPE_CHECKING:
    from torch import nn

    from recon import Problem

_OWN = "A backbone of your own is named path/to/file.py:function, where the function returns a module."


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem of a command line, with the network that `--backbone` names.

    Raises:
        UsageError: there is no such problem or backbone, or the two do not fit.
        ProblemError: the user's code raised.
    """
    backbone = "" if args.backbone is None else backbone_name(args.backbone)
    if backbone and args.pretrained is not None:
        args.parser.error("--pretrained is of the problem's own network, so it does not go with --backbone")
    return with_backbone(problems.get(args.problem, **problem_options(args)), backbone)


def backbone_name(text: str) -> str:
    """The backbone that `--backbone` names, as a run keeps it.

    Raises:
        UnknownNameError: there is none.
    """
    name = _name(text)
    if not name:
        raise UnknownNameError("backbone", text, models.__all__, _OWN)
    return name


def model_backbone(text: str) -> str:
    """The backbone that `--model` names, as a run keeps it; empty if it names a folder.

    Raises:
        UnknownNameError: it is neither.
    """
    name = "" if Path(text).exists() else _name(text)
    if name or Path(text).exists() or Path(text).name != text:
        return name
    folders = sorted(path.name for path in Path().iterdir() if path.is_dir())
    raise UnknownNameError("folder or backbone", text, [*models.__all__, *folders], _OWN)


def _name(text: str) -> str:
    if text in models.__all__:
        return text
    target, colon, function = text.rpartition(":")
    if not colon:
        return ""
    return f"{Path(target).resolve()}:{function}" if target.endswith(".py") else text


def is_own(name: str) -> bool:
    """Whether a backbone is a function of the user's: code that the user must name, and no file may."""
    return ":" in name


def backbone_title(problem: Problem, model: nn.Module) -> str:
    """What a conflict map calls the problem's network: recon's name of it, else that of its class."""
    return problem.backbone if problem.backbone in models.__all__ else type(model).__name__


def with_backbone(problem: Problem, name: str) -> Problem:
    """The problem with another network; the same problem if the name is empty.

    Raises:
        UsageError: the backbone does not fit the problem.
        ProblemError: the problem's code raised.
    """
    if not name:
        return problem
    from recon_cli.backbone_fit import maker  # late: it imports torch

    return replace(problem, make_model=maker(name, problem), backbone=name)
