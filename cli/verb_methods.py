"""`recon methods`: the gradient methods."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

import recon
from recon.tables import text_table
from recon_cli.parsing import Report, add_verb

if TYPE_CHECKING:
    from recon.methods import MethodEntry
    from recon_cli.parsing import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "methods",
        run,
        "list the gradient methods",
        """
        recon methods
        recon methods cagrad
        recon train digits --method cagrad:c=0.5 --out run
        """,
        "A weighting weighs the losses and takes one backward pass a step; an aggregator combines the task gradients "
        "and takes one pass a task.",
    )
    parser.add_argument("method", nargs="?", metavar="METHOD", help="tell more about one of them")


def run(args: argparse.Namespace) -> Report:
    """List them all, or describe one."""
    if args.method:
        entry = recon.methods.entry(args.method)
        return Report(_describe(entry), asdict(entry))
    entries = [recon.methods.entry(name) for name in recon.methods.names()]
    rows = [[entry.name, entry.family, entry.describe_options(), entry.title] for entry in entries]
    table = text_table(["method", "family", "options", "what it is"], rows, left=4)
    more = "`recon methods METHOD` gives the paper and the length of the update."
    return Report(f"{table}\n\n{more}", {"methods": [asdict(entry) for entry in entries]})


def _describe(entry: MethodEntry) -> str:
    return "\n".join(
        [
            f"{entry.name}: {entry.title}",
            f"  family:  {entry.family}",
            f"  paper:   {entry.paper}",
            f"  update:  {entry.scale}",
            f"  options: {entry.describe_options()}",
        ]
    )
