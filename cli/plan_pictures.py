"""`recon plan --frontier` and `--picture`: the trade-off between plans, and the branched network. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import UsageError
from recon_cli.outputs import check_file

if TYPE_CHECKING:
    from torch import nn

    from recon import BranchPlan
    from recon.cost_model import CostModel
    from recon.grouping import Groups
    from recon.matching import Match
    from recon.planning import Choice
    from recon_cli.parsing import Parser

_PNG = b"PNG"
_TABLE_ALONE = Path()


def add_picture_options(parser: Parser) -> None:
    """What else a plan can be shown as."""
    parser.add_argument(
        "--frontier",
        type=Path,
        nargs="?",
        const=_TABLE_ALONE,
        metavar="FILE.png",
        help="show what the plans of every K and of a series of budgets cover and cost, beside the chosen one; draw "
        "them into a file, if one is named",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the branched network")


def check_pictures(args: argparse.Namespace) -> None:
    """Refuse files that are not to be written, before any work is done.

    Raises:
        UsageError: there is something else already, the folder takes no files, or there is no map for a frontier.
    """
    if args.frontier is not None and args.map is None:
        args.parser.error("--frontier needs --map MAP: it tells what the plans cover. `recon profile` makes one")
    for option, path in (("--frontier", args.frontier), ("--picture", args.picture)):
        if path is None or path == _TABLE_ALONE:
            continue
        if path.suffix.lower() != ".png":
            raise UsageError(f"{option} {path}: pictures are PNG files. Give a name that ends in .png.")
        check_file(path, _PNG)


def show_frontier(
    args: argparse.Namespace, found: Match, model: nn.Module, costs: CostModel, groups: Groups, chosen: Choice
) -> tuple[list[str], dict[str, Any]]:
    """The frontier as lines of text and as plain values, drawn if a file is named; nothing without --frontier."""
    if args.frontier is None:
        return [], {}
    from recon.frontier import frontier, frontier_table

    points = frontier(found, model, costs, groups=groups, threshold=args.threshold, chosen=chosen)
    lines = ["", frontier_table(points)]
    if args.frontier != _TABLE_ALONE:
        from recon.frontier_picture import draw_frontier  # late: it imports matplotlib

        draw_frontier(points, args.frontier)
        lines.append(f"Saved {args.frontier}.")
    return lines, {"frontier": [point.as_dict() for point in points]}


def show_network(
    args: argparse.Namespace, costs: CostModel, plan: BranchPlan, title: str, samples: int
) -> tuple[list[str], dict[str, Any]]:
    """Draw the network if --picture asks for it, and say so."""
    if args.picture is None:
        return [], {}
    from recon.network_picture import draw_network  # late: it imports matplotlib

    draw_network(costs, plan.layers, args.picture, title, samples)
    return [f"Saved {args.picture}."], {"picture": str(args.picture)}
