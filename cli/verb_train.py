"""`recon train`: any method on a plain or a branched model, or one model for each task."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon import problems
from recon.runs import Run
from recon.tables import metrics_table, short_number
from recon_cli.outputs import check_folder
from recon_cli.parsing import (
    METHOD,
    Report,
    add_problem,
    add_training_options,
    add_verb,
    positive_integer,
    problem_options,
)

if TYPE_CHECKING:
    from recon_cli.parsing import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "train",
        run,
        "train a plain or a branched model, or one model for each task",
        """
        recon train digits --out joint
        recon train digits --model branched --method cagrad:c=0.5 --out recon4
        recon train digits --single-task --out single
        recon compare joint recon4 single
        """,
        "The weights are saved after every epoch: Ctrl-C loses the epoch that it falls into, no more.",
    )
    add_problem(parser)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="start from the model that convert or train saved")
    parser.add_argument("--method", help=f"{METHOD} (default: joint)")
    parser.add_argument("--epochs", type=positive_integer, help="default: the problem's own")
    parser.add_argument("--single-task", action="store_true", help="train one model for each task: the baselines of Δm")
    add_training_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the run goes")


def run(args: argparse.Namespace) -> Report:
    """Train, evaluate, save."""
    if args.single_task and args.model:
        args.parser.error("--single-task trains fresh models, so it does not go with --model")
    if args.single_task and args.method not in (None, "joint"):
        args.parser.error(f"--single-task has one task at a time, so it does not go with --method {args.method}")
    check_folder(args.out)
    problem = problems.get(args.problem, **problem_options(args))
    method = args.method or "joint"
    recon.methods.parse(method)
    from recon_cli import training, workbench  # late: they import torch

    device = workbench.choose_device(args.device)
    job = training.Training(problem, args.out, args.epochs or problem.epochs, args.seed, args.lr, device)
    return _report(args, job.single_tasks() if args.single_task else job.together(method, args.model))


def _report(args: argparse.Namespace, trained: Run) -> Report:
    other = "joint" if trained.is_single_task else "single"
    text = [
        f"{trained.label}: epochs {trained.epochs}, seed {trained.seed}",
        "",
        metrics_table(trained.results),
        "",
        f"{short_number(trained.parameters)} parameters, {short_number(trained.macs)} multiply-adds per sample, "
        f"{1000 * trained.seconds_per_step:.1f} ms a step.",
        f"Saved {args.out}. Next, compare it with other runs, as in:",
        f"  {shlex.join(['recon', 'compare', other, str(args.out)])}",
    ]
    return Report("\n".join(text), {"folder": str(args.out), **trained.as_dict()})
