"""`recon compare`: runs side by side, how well they do and what they cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recon.experiments import Run, compare
from recon_cli.parser import Report, add_verb, any_path
from recon_cli.terminal import tell

if TYPE_CHECKING:
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "compare",
        run,
        "compare runs: metrics, Δm, parameters, multiply-adds and step time",
        """
        recon compare joint recon4 --baseline single
        recon compare single joint recon4
        recon compare runs/* --json
        """,
        "Δm is the mean relative change against single-task models in percent, higher is better. Ratios refer to the "
        "first plain run, or else the smallest. Multiply-adds are of one sample's forward pass. Step times, loading "
        "included, were measured in each run: for a ratio to rely on, see `recon convert`, which times both models in "
        "turn.",
    )
    parser.add_argument("runs", nargs="+", type=any_path, metavar="RUN", help="a folder that `recon train` wrote")
    parser.add_argument(
        "--baseline", type=any_path, metavar="RUN", help="what Δm is against (default: the single-task run among RUN)"
    )


def run(args: argparse.Namespace) -> Report:
    """Load the runs and put them side by side."""
    baseline = Run.load(args.baseline) if args.baseline else None
    comparison = compare({str(folder): Run.load(folder) for folder in args.runs}, baseline)
    if not args.json:  # with it, they are in the object
        for note in comparison.notes:
            tell(f"note: {note}")
    return Report(comparison.text(), comparison.as_dict())
