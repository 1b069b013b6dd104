"""`recon plan --frontier` and `--picture`: the trade-off between plans, and the branched network. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import UsageError
from recon_cli.options.outputs import check_file
from recon_cli.options.selection import candidates_of, groups_of, surgery_name
from recon_cli.parser import file_path

if TYPE_CHECKING:
    from torch import nn

    from recon.plans import Choice, CostModel, Match
    from recon_cli.parser import Parser

_PNG = b"PNG"
_FRONTIER, _NETWORK = Path("frontier.png"), Path("network.png")


def add_picture_options(parser: Parser) -> None:
    """What else a plan can be shown as."""
    parser.add_argument(
        "--frontier",
        type=file_path,
        nargs="?",
        const=_FRONTIER,
        metavar="FILE.png",
        help=f"print and draw what the plans of every K and of a series of budgets cover and cost, beside the chosen "
        f"one (default: {_FRONTIER}), and the branched network beside it ({_NETWORK}, unless --picture names another)",
    )
    parser.add_argument(
        "--picture",
        type=file_path,
        nargs="?",
        const=_NETWORK,
        metavar="FILE.png",
        help=f"draw the branched network (default: {_NETWORK})",
    )


def check_pictures(args: argparse.Namespace) -> None:
    """Name the pictures, and refuse files that are not to be written, before any work is done."""
    if args.frontier is not None and args.map is None:
        args.parser.error("--frontier needs --map MAP: it says what the plans cover. `recon profile` makes one")
    if args.frontier is not None and args.picture is None:
        args.picture = args.frontier.with_name(_NETWORK.name)
    for option, path in (("--frontier", args.frontier), ("--picture", args.picture)):
        if path is None:
            continue
        if path.suffix.lower() != ".png":
            raise UsageError(f"{option} {path}: pictures are PNG files. Give a name that ends in .png.")
        check_file(path, _PNG)


def show_pictures(
    args: argparse.Namespace, model: nn.Module, found: Match | None, costs: CostModel, choice: Choice, samples: int
) -> tuple[list[str], dict[str, Any]]:
    """What --frontier and --picture ask for: lines of text and plain values; pictures are saved.

    `samples` is how many the costs' example inputs are.
    """
    lines: list[str] = []
    data: dict[str, Any] = {}
    pictures: list[Path] = []
    if args.frontier is not None and found is not None:
        from recon.plans import frontier  # late: these import torch and matplotlib
        from recon.plans.pictures.trade_off_picture import draw_frontier
        from recon.plans.trade_off import frontier_table  # late: these import torch and matplotlib

        points = frontier(
            found,
            model,
            costs,
            groups=groups_of(args),
            threshold=args.threshold,
            by=args.by,
            layers=candidates_of(args),
            exclude=args.exclude,
            units=args.units,
            chosen=choice,
        )
        lines += ["", frontier_table(points)]
        data["frontier"] = [point.as_dict() for point in points]
        draw_frontier(points, args.frontier)
        pictures.append(args.frontier)
    if args.picture is not None:
        from recon.plans.pictures.network_picture import draw_network  # late: it imports matplotlib

        title = f"{args.problem}, {surgery_name(args, choice.plan)}"
        draw_network(costs, choice.plan.layers, args.picture, title, samples)
        pictures.append(args.picture)
    if pictures:
        lines += ["", f"Saved {' and '.join(map(str, pictures))}."]
    return lines, {**data, "pictures": [str(path) for path in pictures]}
