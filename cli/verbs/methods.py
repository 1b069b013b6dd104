"""`recon methods`: the gradient methods."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import recon
from recon.support.tables import markdown_table
from recon_cli.parser import Report, add_verb

if TYPE_CHECKING:
    from recon.methods import MethodEntry
    from recon_cli.parser import Verbs


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
        recon methods --markdown
        recon train digits --method cagrad:c=0.5 --out run
        recon train digits --method uw+pcgrad --out run
        recon train digits --method examples/own_method.py:clipped_sum --out run
        """,
        "A weighting weighs the losses and needs one backward pass a step; an aggregator combines the task gradients "
        "and needs one pass a task. A weighting can feed an aggregator, as in uw+pcgrad.",
    )
    parser.add_argument("method", nargs="?", metavar="METHOD", help="describe this one only")
    parser.add_argument("--markdown", action="store_true", help="print the documentation's table")


def run(args: argparse.Namespace) -> Report:
    """List them all, or describe one."""
    entries = [recon.methods.entry(name) for name in ([args.method] if args.method else recon.methods.names())]
    text = _table(entries) if args.markdown else "\n\n".join(map(_describe, entries))
    return Report(text, asdict(entries[0]) if args.method else {"methods": [asdict(entry) for entry in entries]})


def _describe(entry: MethodEntry) -> str:
    lines = {"paper": entry.paper, "update": entry.scale, "options": entry.describe_options()}
    indented = [_wrap(f"  {what + ':':9}{line}") for what, line in lines.items()]
    return "\n".join([f"{entry.name}: {entry.title} ({entry.family})", *indented])


def _wrap(line: str) -> str:
    return textwrap.fill(line, 100, subsequent_indent=11 * " ", break_on_hyphens=False)


def _table(entries: list[MethodEntry]) -> str:
    header = ["method", "", "family", "options", "length of the update", "source"]
    rows = [[f"`{e.name}`", e.title, e.family, _options(e), e.scale, e.paper] for e in entries]
    return markdown_table(header, rows)


def _options(entry: MethodEntry) -> str:
    return ", ".join(f"`{option}={default}`" for option, default in entry.options.items())
