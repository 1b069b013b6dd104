"""The options that choose layers and groups: for `recon plan` and `recon convert`. Torch is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recon_cli.options.rename import add_rename_option, renames
from recon_cli.parser import any_path, positive_integer, positive_number, share, threshold
from recon_cli.terminal import tell

if TYPE_CHECKING:
    from torch import nn

    from recon import BranchPlan, Problem
    from recon.maps.measures import By
    from recon.plans import Choice, CostModel, Match
    from recon.plans.grouping import Groups
    from recon_cli.parser import Parser

_SELECT = ("top", "random", "first", "last", "norms")
_BUDGETS = ("max_params", "max_macs")
_BY_MAP = ("top_k", "share", *_BUDGETS, "auto", "like")
_NAMED = ("layers", "matching")
_AMONG = (*_NAMED, "exclude", "units")
NAMES = ("map", *_BY_MAP, *_AMONG, "select", "by", "groups", "threshold", "rename", "seed")
"""The arguments that make the same choice with another verb."""


def add_options(parser: Parser) -> None:
    """Add the options that say which layers are branched, and which tasks share a copy."""
    parser.add_argument("--map", type=any_path, metavar="MAP", help="the conflict map that chooses the layers")
    ways = parser.add_argument_group("which layers", "One of these; --max-params and --max-macs may go together.")
    which = ways.add_mutually_exclusive_group()
    which.add_argument("--top-k", type=positive_integer, metavar="K", help="branch K layers of the map")
    which.add_argument(
        "--share", type=share, metavar="PART", help="branch the fewest layers with this part of all conflict"
    )
    which.add_argument(
        "--auto",
        action="store_true",
        help="branch all that conflict above their noise floor, beyond doubt; with a map that has none, all that "
        "conflict more than the mean layer, beyond noise",
    )
    which.add_argument(
        "--like",
        type=any_path,
        metavar="FOLDER",
        help="a control, by --select: as many parameters as the branched model in FOLDER adds",
    )
    ways.add_argument(
        "--max-params",
        type=positive_number,
        metavar="RATIO",
        help="cover the most conflict within RATIO times the parameters",
    )
    ways.add_argument(
        "--max-macs", type=positive_number, metavar="RATIO", help="the same within RATIO times the multiply-adds"
    )
    among = parser.add_argument_group(
        "among which layers",
        "--layers or --matching, alone, branch what they name. Beside a choice by the map, they limit it.",
    )
    named = among.add_mutually_exclusive_group()
    named.add_argument("--layers", nargs="+", metavar="NAME", help="these layers; alone, they need no map")
    named.add_argument(
        "--matching", metavar="REGEX", help="shared layers whose whole name matches; alone, without a map"
    )
    among.add_argument("--exclude", nargs="+", metavar="REGEX", help="without those whose whole name matches")
    among.add_argument(
        "--units",
        nargs="+",
        metavar="REGEX",
        help=r"layers that are branched together or not at all: 'layer\d+\.\d+' joins every block, 'lora_[AB]' the two "
        "matrices of every adapter",
    )
    parser.add_argument(
        "--select",
        choices=_SELECT,
        help="the highest scores (default); or, as controls, layers at random, the first, the last, or the norms",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["per-task"],
        metavar="GROUP",
        help="per-task: a copy for each task (default); a number of groups; conflict: tasks that rarely conflict in a "
        "layer share it; or the groups themselves, as in a+b c",
    )
    parser.add_argument("--threshold", type=threshold, metavar="S", help="score at another S (default: the map's own)")
    add_by_option(parser)
    add_rename_option(parser, "rename the map's layers to the model's,")


def add_by_option(parser: Parser, default: By | None = None) -> None:
    """Add --by."""
    parser.add_argument(
        "--by",
        choices=("count", "rate", "excess"),
        default=default,
        help="score layers by their conflicts (the default), by their share of the steps in which a pair of tasks "
        "met, or by how far that lies above the noise floor",
    )


def check(args: argparse.Namespace) -> None:
    """Check that the options go together, before anything is loaded."""
    error = args.parser.error
    given = [name for name in _BY_MAP if getattr(args, name) not in (None, False)]
    among = [name for name in _NAMED if getattr(args, name) is not None]
    budget = [name for name in given if name in _BUDGETS]
    if not given and not among and args.select != "norms":
        error(f"one of the arguments {' '.join(map(_flag, (*_BY_MAP, *_NAMED)))} is required")
    if budget and len(given) > len(budget):
        other = next(name for name in given if name not in _BUDGETS)
        error(f"argument {_flag(budget[0])}: not allowed with argument {_flag(other)}")
    if not args.map and not _is_named(args):
        error(f"{_flag((*given, 'select')[0])} needs --map MAP: `recon profile` makes one")
    if renames(args) and not args.map:
        error("--rename goes with --map: it renames the map's layers")
    for option in ("select", "threshold", "by", "units"):
        if _is_named(args) and getattr(args, option) is not None:
            error(f"{_flag(option)} goes with a choice by the map, such as --top-k, not with {_flag(among[0])} alone")
    if not args.map and (args.groups == ["conflict"] or args.groups[0].isdigit()):
        error(f"--groups {args.groups[0]} needs --map MAP, which says how often tasks conflict")


def _is_named(args: argparse.Namespace) -> bool:
    """Whether --layers or --matching name what is branched, rather than what to choose among."""
    by_map = any(getattr(args, name) not in (None, False) for name in _BY_MAP) or args.select == "norms"
    return not by_map and any(getattr(args, name) is not None for name in _NAMED)


def has_budget(args: argparse.Namespace) -> bool:
    """Whether the choice needs the costs of plans."""
    return any(getattr(args, name) is not None for name in _BUDGETS)


def choose(
    args: argparse.Namespace, problem: Problem, model: nn.Module, found: Match | None, costs: CostModel | None
) -> Choice:
    """The plan that the options ask for; what to know before trusting it is said on stderr.

    Args:
        args: of the command line.
        problem: the problem.
        model: its unbranched model.
        found: the map, matched to the model; `None` where layers are named without one.
        costs: of the model; needed for a budget.

    Raises:
        UsageError: see `recon.plan`.
    """
    import recon.plans.planning  # late: these import torch
    from recon.branching import load_plan
    from recon.plans import Selection
    from recon.plans.selection import without
    from recon.support.network.layer_choice import choose_names
    from recon.support.network.layers import find_layers

    tasks, groups = problem.task_names, groups_of(args)
    if found is None:
        known = {layer.name: layer.aliases for layer in find_layers(model)}
        named = args.layers is not None
        names = without(args.layers, args.exclude) if named else choose_names(known, args.matching, args.exclude)
        plan = recon.BranchPlan.per_task(names, tasks)
        if not isinstance(groups, str | int):
            plan = recon.BranchPlan.grouped(dict.fromkeys(names, groups), tasks)
        return recon.plans.planning.Choice(plan.on(model), "named", {}, {})
    selection = Selection(
        top_k=args.top_k,
        share=args.share,
        max_params=args.max_params,
        max_macs=args.max_macs,
        auto=args.auto,
        layers=args.layers or args.matching,
        like=load_plan(args.like) if args.like else None,
        select=args.select or "top",
        seed=args.seed,
        exclude=args.exclude,
        units=args.units,
        by=args.by,
    )
    choice = recon.plans.choose(found, model, selection, tasks, groups=groups, threshold=args.threshold, costs=costs)
    for note in choice.notes:
        tell(f"note: {note}")
    return choice


def candidates_of(args: argparse.Namespace) -> Sequence[str] | None:
    """The names or expressions of the layers to choose among; None for all, or where layers are named."""
    return None if _is_named(args) else [args.matching] if args.matching else args.layers


def surgery_name(args: argparse.Namespace, plan: BranchPlan) -> str:
    """The name in tables of how the layers were chosen; the same for every seed."""
    select = args.select or "top"
    budget = " ".join(f"{name}={getattr(args, name):g}" for name in _BUDGETS if getattr(args, name) is not None)
    if _is_named(args):
        name = f"K={len(plan.layers)} by name"
    elif args.top_k:
        name = f"{'Recon' if select == 'top' else select} K={args.top_k}"
    elif budget:
        name = budget if select == "top" else f"{select} {budget}"
    elif args.share:
        name = f"share={args.share:g}"
    elif args.like:
        name = f"{select} like {args.like.name}"
    else:
        name = "auto" if args.auto else "all norms"
    name += f" by {args.by}" if args.by not in (None, "count") else ""
    limits = {"among": candidates_of(args), "without": args.exclude, "units": args.units}
    name += "".join(f", {word} {' '.join(names)}" for word, names in limits.items() if names)
    groups = " ".join(args.groups)
    return name if groups == "per-task" else f"{name}, groups {groups}"


def covered_line(choice: Choice) -> str:
    """How much of the conflict the plan parts."""
    from recon.plans.scoring import named  # late: it imports numpy

    what = {"count": "", "rate": " (by rate)", "excess": " above the noise floor"}[choice.by]
    unmeasured = f" of what was measured; never measured: {named(choice.unmeasured)}" if choice.unmeasured else ""
    return f"Conflict{what} covered: {100 * choice.covered:.1f} %{unmeasured}."


def groups_lines(layers: Mapping[str, Any]) -> list[str]:
    """Which tasks share the copies of these layers: `{layer: partition}`, one line for each partition."""
    lines = []
    for partition in dict.fromkeys(layers.values()):
        names = [name for name, split in layers.items() if split == partition]
        of = "" if len(names) == len(layers) else f" of {', '.join(names)}"
        if len(partition.groups) == len(partition.tasks):
            who = f"one for each of the tasks {', '.join(partition.tasks)}"
        else:
            who = " | ".join(" ".join(group) for group in partition.groups)
        lines.append(f"{len(partition.groups)} copies{of}: {who}")
    return lines


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def groups_of(args: argparse.Namespace) -> Groups:
    """What --groups says, as `recon.plan` accepts it."""
    words: Sequence[str] = args.groups
    if len(words) > 1 or "+" in words[0]:
        return [word.split("+") for word in words]
    return int(words[0]) if words[0].isdigit() else words[0]
