"""`recon check`: says in seconds what would work with a problem, and what it would cost; trains nothing."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from recon_cli.options.problem import PROBLEM_NAMES, add_problem, problem_of
from recon_cli.options.recipe import add_accumulate
from recon_cli.parser import Report, add_device_option, add_verb, command_words, seed

if TYPE_CHECKING:
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "check",
        run,
        "say in seconds whether a problem can be profiled and branched, and what that costs; trains nothing",
        """
        recon check digits
        recon check examples/own_problem.py:problem
        recon check path/to/file.py:problem --mode per-task --json
        recon check three_loaders.py:problem --accumulate tasks
        """,
        "Runs the model on the first batches: the losses, which tasks meet, which layers they share, whether each "
        "statement of the forward works on a branched model, parameters, multiply-adds, and the time and memory of a "
        "profiled step. Exit code 1 if something stands in the way.",
    )
    add_problem(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the initial weights and the loaders (default: 0)")
    parser.add_argument(
        "--mode",
        choices=("fan", "per-task"),
        default="fan",
        help="how the model would be branched, as in `recon convert` (default: fan)",
    )
    add_accumulate(parser.add_argument_group("how a step is taken"))
    add_device_option(parser)


def run(args: argparse.Namespace) -> Report:
    """Check, and say what to do next."""
    problem = problem_of(args)
    from recon.experiments.checks.check_up import check_problem  # late: these import torch
    from recon.experiments.inputs import choose_device

    device = choose_device(args.device)
    found = check_problem(problem, args.seed, device, args.mode, args.accumulate)
    next_command = [
        "recon",
        "profile",
        *command_words(args, (*PROBLEM_NAMES, "seed", "accumulate")),
        "--out",
        "map.json",
    ]
    text = [str(found), *(["Next, count conflicts:", f"  {shlex.join(next_command)}"] if found.ok else [])]
    return Report("\n".join(text), {"problem": problem.name, **found.as_dict()}, failed=not found.ok)
