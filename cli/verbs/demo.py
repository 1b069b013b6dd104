"""`recon demo`: profile, plan, branch and compare on real digits, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recon.experiments.bench.presets import DEMO
from recon_cli.options.outputs import claimed_folder
from recon_cli.parser import Report, add_device_option, add_verb, any_path, positive_integer
from recon_cli.progress import say

if TYPE_CHECKING:
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "demo",
        run,
        "profile, branch, retrain and compare on real digits; a few minutes on a CPU",
        """
        recon demo
        recon demo --seeds 1 --epochs 3 --out quick
        """,
        "Profiles once; trains single-task models, joint training and PCGrad, with and without Recon, and with as many "
        "layers branched at random; prints one table, whoever wins. After an interruption, the same command goes on.",
    )
    parser.add_argument(
        "--out", type=any_path, default=Path("demo"), metavar="FOLDER", help="where the results go (default: demo)"
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=DEMO.seeds, help="train everything with so many seeds (default: 2)"
    )
    parser.add_argument(
        "--epochs", type=positive_integer, default=DEMO.epochs, help="epochs of every training (default: 6)"
    )
    parser.add_argument("--top-k", type=positive_integer, default=8, metavar="K", help="layers to branch (default: 8)")
    parser.add_argument(
        "--workers", type=positive_integer, help="trainings at the same time (default: one a core, up to 4)"
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> Report:
    """Run it all and report."""
    with claimed_folder(args.out, marks=("map.json", "results.json", "runs")):
        return _run(args)


def _run(args: argparse.Namespace) -> Report:
    from recon.experiments.bench.demo import Demo
    from recon.experiments.bench.variants import default_workers
    from recon.experiments.inputs import choose_device
    from recon_cli.interruptions import goes_on_when_given_again

    device = choose_device(args.device)
    workers = args.workers or default_workers(device)
    with goes_on_when_given_again(args):
        story = Demo(args.out, args.seeds, args.epochs, args.top_k, device, workers, say).run()
    return Report(story.text(args.out), story.data())
