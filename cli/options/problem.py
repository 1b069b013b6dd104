"""The options that name a problem, and the problem made from them. Torch is imported late."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon import models, problems
from recon.errors import UnknownNameError
from recon_cli.parser import Parser, any_path, positive_integer

if TYPE_CHECKING:
    from recon import Problem

PROBLEM = "a built-in problem (see `recon problems`), path/to/file.py:function or package.module:function"
BACKBONE = f"one that fits of {', '.join(models.__all__)}, or path/to/file.py:function"
PROBLEM_NAMES = ("problem", "data_root", "train_samples", "backbone", "pretrained")
"""The arguments that name the same problem to another verb."""
_OWN = "A backbone of your own is named path/to/file.py:function, where the function returns a module."


def add_problem(parser: Parser) -> None:
    """Add what `problem_of` reads: PROBLEM, the options that some problems have, and another network for it."""
    parser.add_argument("problem", metavar="PROBLEM", help=PROBLEM)
    parser.add_argument(
        "--data-root", type=any_path, metavar="DIR", help="where the problem's data set is, if it needs one"
    )
    parser.add_argument(
        "--train-samples",
        type=positive_integer,
        metavar="N",
        help="use only N training samples (default: all), if the problem can",
    )
    parser.add_argument("--backbone", metavar="NAME", help=f"another network than the problem's: {BACKBONE}")
    parser.add_argument(
        "--pretrained",
        type=any_path,
        metavar="FILE",
        help="torchvision's ImageNet weights (.pth) for the problem's backbone, if it accepts them",
    )


def problem_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `recon.problems.get` accepts beside the problem's name."""
    return {"data_root": args.data_root, "train_samples": args.train_samples, "pretrained": args.pretrained}


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem of a command line, with the network that `--backbone` names."""
    backbone = "" if args.backbone is None else backbone_name(args.backbone)
    if backbone and args.pretrained is not None:
        args.parser.error("--pretrained is for the problem's own network, so it does not go with --backbone")
    problem = problems.get(args.problem, **problem_options(args))
    if not backbone:
        return problem
    from recon.experiments import with_backbone  # late: it imports torch

    return with_backbone(problem, backbone)


def backbone_name(text: str) -> str:
    """The backbone that `--backbone` names, as a run keeps it."""
    name = _name(text)
    if not name:
        raise UnknownNameError("backbone", text, models.__all__, _OWN)
    return name


def model_backbone(text: str) -> str:
    """The backbone that `--model` names, as a run keeps it; empty if it names a folder."""
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
