"""The options of a problem, and the problem that they name. Torch is imported late."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from recon import models, problems
from recon_cli.parser import Parser, any_path, positive_integer

if TYPE_CHECKING:
    from recon import Problem

PROBLEM = "a built-in problem (see `recon problems`), path/to/file.py:function or package.module:function"
BACKBONE = f"one that fits of {', '.join(models.__all__)}, or path/to/file.py:function"


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


def problem_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that name the same problem with the same options to another verb."""
    options = {**problem_options(args), "backbone": args.backbone}
    given = [(option, value) for option, value in options.items() if value is not None]
    flags = [word for option, value in given for word in (f"--{option.replace('_', '-')}", str(value))]
    return [args.problem, *flags]


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem of a command line, with the network that `--backbone` names.

    Raises:
        UsageError: there is no such problem or backbone, or the two do not fit.
        ProblemError: the user's code raised.
    """
    from recon.experiments import with_backbone  # late: they import torch
    from recon.experiments.backbones import backbone_name  # late: they import torch

    backbone = "" if args.backbone is None else backbone_name(args.backbone)
    if backbone and args.pretrained is not None:
        args.parser.error("--pretrained is for the problem's own network, so it does not go with --backbone")
    return with_backbone(problems.get(args.problem, **problem_options(args)), backbone)
