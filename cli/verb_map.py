"""`recon map show`: what a conflict map says."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon_cli.outputs import check_file
from recon_cli.parsing import Report, add_verb, positive_integer, threshold
from recon_cli.ranking import ranked_layers, ranking_table

if TYPE_CHECKING:
    from recon import ConflictMap
    from recon_cli.parsing import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "map",
        run,
        "show what a conflict map says",
        """
        recon map show map.json
        recon map show map.json --threshold -0.05 --top 10
        recon map show map.json --plot map.png
        """,
    )
    parser.add_argument("action", choices=("show",), help="show: the ranking of the shared layers")
    parser.add_argument("map", type=Path, metavar="MAP", help="a file that `recon profile` wrote")
    parser.add_argument("--threshold", type=threshold, metavar="S", help="score at another S (default: the map's own)")
    parser.add_argument("--top", type=positive_integer, metavar="N", help="only the first N layers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw layers x quarters of the training")


def run(args: argparse.Namespace) -> Report:
    """Load the map and show it."""
    if args.plot:
        check_file(args.plot, b"PNG")
    cmap = recon.ConflictMap.load(args.map)
    if args.plot:
        from recon.pictures import heatmap  # late: it imports matplotlib

        heatmap(cmap, args.plot)
    layers = ranked_layers(cmap, args.threshold)
    own = args.threshold is None or args.threshold == cmap.threshold
    text = [*_header(cmap), "", ranking_table(layers, args.top, quarters=True), ""]
    text.append(f"q1-q4: the share in each quarter of the training{'' if own else f', at {cmap.threshold:g}'}.")
    if args.plot:
        text.append(f"Saved {args.plot}.")
    data = {
        "map": str(args.map),
        "plot": str(args.plot) if args.plot else None,
        "tasks": cmap.tasks,
        "threshold": cmap.threshold if args.threshold is None else args.threshold,
        "quarters_threshold": cmap.threshold,
        "steps": cmap.steps,
        "skipped": cmap.skipped,
        "made_by": cmap.made_by,
        "layers": layers[: args.top],
    }
    return Report("\n".join(text), data)


def _header(cmap: ConflictMap) -> list[str]:
    made_by = ", ".join(f"{key} {value}" for key, value in cmap.made_by.items()) or "unknown"
    return [
        f"tasks:     {', '.join(cmap.tasks)}",
        f"steps:     {cmap.steps}, of which {cmap.skipped} skipped as not finite",
        f"threshold: {cmap.threshold:g}",
        textwrap.fill(made_by, 100, initial_indent="made by:   ", subsequent_indent=" " * 11),
    ]
