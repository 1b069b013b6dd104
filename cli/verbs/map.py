"""`recon map ACTION`: shows, compares, merges and imports conflict maps."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import recon
from recon.errors import UsageError
from recon.support.tables import counted
from recon_cli.options.outputs import check_file
from recon_cli.options.rename import add_rename_option, renames
from recon_cli.options.selection import add_by_option
from recon_cli.parser import Parser, Report, add_verb, any_path, file_path, positive_integer, threshold, two_tasks
from recon_cli.terminal import tell
from recon_cli.texts.map_compare import comparison_data, comparison_text
from recon_cli.texts.map_pairs import pairs_data, pairs_text
from recon_cli.texts.map_show import header_text, notes_below, nothing_text, ranked_layers, ranking_table

if TYPE_CHECKING:
    from recon import ConflictMap
    from recon_cli.parser import Verbs

_MARK = b'"recon conflict map"'
_TOP = 10
_ALL = ""  # layers, of --pairs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "map",
        show,
        "show, compare, merge or import conflict maps",
        """
        recon map show map.json
        recon map compare seed0.json seed1.json
        recon map merge seed0.json seed1.json --out both.json
        recon map import 0_Baseline_ep39_lw_cos_S-0.1.json --threshold -0.1 --out map.json
        """,
        "`recon map ACTION --help` says more about each.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for add_action in (_add_show, _add_compare, _add_merge, _add_import):
        for option in add_action(actions)._actions:
            if option.dest in ("json", "debug"):  # given before the action, they apply too
                option.default = argparse.SUPPRESS


def _add_show(actions: Verbs) -> Parser:
    parser = add_verb(
        actions,
        "show",
        show,
        "show the ranking of the shared layers",
        """
        recon map show map.json
        recon map show map.json --top-k 8
        recon map show map.json --threshold -0.05 --top 10 --by rate --tasks seg,depth
        recon map show map.json --plot map.png
        recon map show map.json --pairs
        recon map show map.json --pairs layer4.1.conv2 --picture pairs.png
        """,
        "The interval holds the scores of 90 % of resampled trainings, by a block bootstrap over the steps: it "
        "shows what other batches would have done, not what another seed would.",
    )
    parser.add_argument(
        "map", type=any_path, metavar="MAP", help="a file that `recon profile` wrote, or one from merge or import"
    )
    parser.add_argument(
        "--top-k",
        type=positive_integer,
        metavar="K",
        help="draw the line under the layers that K would branch, and name those within noise of it (default: a "
        "quarter of the layers)",
    )
    _add_scoring(parser)
    _add_top(parser)
    parser.add_argument("--plot", type=file_path, metavar="FILE.png", help="draw layers x quarters of the training")
    parser.add_argument(
        "--pairs",
        nargs="?",
        const=_ALL,
        metavar="LAYER",
        help="show how often each pair of tasks conflicted, over all layers or in one",
    )
    parser.add_argument(
        "--picture", type=file_path, metavar="FILE.png", help="draw --pairs: tasks x tasks, over all layers and in each"
    )
    return parser


def _add_compare(actions: Verbs) -> Parser:
    parser = add_verb(
        actions,
        "compare",
        compare,
        "compare how two maps rank the layers that both have",
        """
        recon map compare seed0.json seed1.json
        recon map compare short.json long.json --top-k 25 --top 10
        recon map compare mine.json published.json --rename =backbone
        """,
        "The maps may differ in data, tasks, method, seed and threshold. Spearman's and Kendall's rank correlations "
        "are 1 for the same order, about 0 for unrelated ones, -1 for opposite ones. Layers with equal scores share "
        "the mean of their ranks.",
    )
    parser.add_argument("first", type=any_path, metavar="A", help="a conflict map")
    parser.add_argument("second", type=any_path, metavar="B", help="another one")
    parser.add_argument(
        "--top-k",
        type=positive_integer,
        metavar="K",
        help="compare the layers that K would branch (default: a quarter of the common layers)",
    )
    add_rename_option(parser, "rename the layers of B to those of A,")
    _add_scoring(parser)
    _add_top(parser)
    return parser


def _add_merge(actions: Verbs) -> Parser:
    parser = add_verb(
        actions,
        "merge",
        merge,
        "add up the maps of several runs, such as seeds, into one",
        """
        recon map merge seed0.json seed1.json seed2.json --out all.json
        """,
        "The runs must agree in tasks, threshold, layers and parameter shapes. Counts and steps are added up, quarter "
        "by quarter.",
    )
    parser.add_argument("maps", type=any_path, nargs="+", metavar="MAP", help="two or more conflict maps")
    _add_out(parser)
    return parser


def _add_import(actions: Verbs) -> Parser:
    parser = add_verb(
        actions,
        "import",
        import_,
        "make a map from a file of the published code (github.com/moukamisama/Recon)",
        """
        recon map import 0_Baseline_ep39_lw_cos_S-0.1.json --threshold -0.1 --out map.json
        recon map import 0_Baseline_ep39_lw_cos.pt --threshold -0.1 --tasks left,right --out map.json
        """,
        "A .json file holds the scores of its layers at one S and nothing else; a .pt file holds every cosine, so that "
        "the map answers for every S. Layer names lose the prefix feature_extractor. and the pieces .m_list.0.",
    )
    parser.add_argument("file", type=any_path, metavar="FILE", help="{layer: score} (.json), or a log of cosines (.pt)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        required=True,
        metavar="S",
        help="the S that a .json file was scored at; any for a .pt file",
    )
    parser.add_argument(
        "--tasks", type=two_tasks, default=(), metavar="A,B", help="the tasks, in the order of that run"
    )
    _add_out(parser)
    return parser


def show(args: argparse.Namespace) -> Report:
    """Load the map and show it."""
    if args.picture and args.pairs is None:
        args.parser.error("--picture goes with --pairs, which it draws; --plot draws the layers")
    for picture in filter(None, (args.plot, args.picture)):
        check_file(picture, b"PNG")
    cmap = recon.ConflictMap.load(args.map)
    if args.plot:
        _plot(cmap, args)
    return _show_ranking(cmap, args) if args.pairs is None else _show_pairs(cmap, args)


def _show_ranking(cmap: ConflictMap, args: argparse.Namespace) -> Report:
    top_k = args.top_k or max(1, len(cmap.layers) // 4)
    tasks, by = args.tasks, args.by
    layers = ranked_layers(cmap, args.threshold, top_k=top_k, tasks=tasks, by=by)
    table = ranking_table(layers, args.top, quarters=True, top_k=top_k, by=by)
    text = [header_text(cmap), "", table, "", *notes_below(cmap, layers, args.threshold, tasks, by)]
    if args.plot:
        text.append(f"Saved {args.plot}.")
    nothing = nothing_text(cmap, layers, args.threshold, tasks, by)
    data = {**_of_map(cmap, args), "quarters_threshold": cmap.threshold, "top_k": top_k, "conflict": not nothing}
    return Report("\n".join(text), {**data, "by": by, "layers": layers[: args.top]})


def _show_pairs(cmap: ConflictMap, args: argparse.Namespace) -> Report:
    from recon.maps.pair_rates import pair_rates  # late: it imports numpy

    layer = None if args.pairs == _ALL else args.pairs
    found = pair_rates(cmap, None if layer is None else [layer], args.tasks, args.threshold)
    text = [header_text(cmap), f"layer:     {layer or 'all'}", "", pairs_text(found, args.top)]
    if args.picture:
        from recon.maps.pictures.pair_picture import draw_pairs  # late: it imports matplotlib

        draw_pairs(cmap, args.picture, layer, args.tasks, args.threshold)
        text.append(f"Saved {args.picture}.")
    shown = {"layer": layer, "pairs": pairs_data(found), "own": found.own}
    return Report("\n".join(text), {**_of_map(cmap, args), **shown})


def _of_map(cmap: ConflictMap, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "map": str(args.map),
        "plot": str(args.plot) if args.plot else None,
        "picture": str(args.picture) if args.picture else None,
        "tasks": args.tasks or cmap.tasks,
        "threshold": cmap.threshold if args.threshold is None else args.threshold,
        "steps": cmap.steps,
        "skipped": cmap.skipped,
        "made_by": cmap.made_by,
    }


def compare(args: argparse.Namespace) -> Report:
    """Load two maps and compare their rankings."""
    rename = renames(args)
    files = args.first, args.second
    first, second = (recon.ConflictMap.load(path) for path in files)
    scoring = {"threshold": args.threshold, "tasks": args.tasks, "by": args.by}
    found = first.compare(second, **scoring, top_k=args.top_k, rename=rename)
    text = comparison_text(files, (first, second), found, args.threshold, args.top)
    return Report(text, comparison_data(files, (first, second), found, args.threshold, args.top) | {"by": args.by})


def merge(args: argparse.Namespace) -> Report:
    """Add up the maps and save the sum."""
    check_file(args.out, _MARK)
    if args.out.exists() and any(path.exists() and path.samefile(args.out) for path in args.maps):
        raise UsageError(f"{args.out} is one of the maps to merge and would be overwritten. Choose another name.")
    cmap = recon.ConflictMap.merge([recon.ConflictMap.load(path) for path in args.maps], [str(p) for p in args.maps])
    return _save(cmap, args, f"{len(args.maps)} maps merged")


def import_(args: argparse.Namespace) -> Report:
    """Read the published file and save it as a map."""
    from recon.maps import read_published  # late: a log of cosines takes torch

    check_file(args.out, _MARK)
    if args.file.suffix != ".json":  # reading the log of a whole training needs a minute
        tell(f"Reading {args.file} ...")
    cmap = read_published(args.file, args.threshold, args.tasks)
    return _save(cmap, args, f"{args.file} imported")


def _save(cmap: ConflictMap, args: argparse.Namespace, done: str) -> Report:
    cmap.save(args.out)
    layers = ranked_layers(cmap)
    steps = "an unknown number of steps" if cmap.steps is None else counted(cmap.steps, "step")
    shared = counted(len(layers), "shared layer")
    text = [
        f"{done}: {shared}, {steps}. Score: how often a cosine was below {cmap.threshold:g}.",
        "",
        ranking_table(layers, _TOP),
        "",
        f"Saved {args.out}. Next: `recon map show {args.out}`, or `recon convert PROBLEM --map {args.out} --top-k K`.",
    ]
    data = {
        "map": str(args.out),
        "tasks": cmap.tasks,
        "threshold": cmap.threshold,
        "steps": cmap.steps,
        "skipped": cmap.skipped,
        "made_by": cmap.made_by,
        "layers": layers,
    }
    return Report("\n".join(text), data)


def _plot(cmap: ConflictMap, args: argparse.Namespace) -> None:
    if any(layer.conflicts is None for layer in cmap.layers):
        raise UsageError(
            f"{args.map} holds no counts by quarter of the training, so there is nothing to draw. Leave --plot out."
        )
    from recon.maps.pictures.heatmap import heatmap  # late: it imports matplotlib

    heatmap(cmap, args.plot)


def _add_scoring(parser: Parser) -> None:
    parser.add_argument("--threshold", type=threshold, metavar="S", help="score at another S (default: the map's own)")
    parser.add_argument(
        "--tasks", type=two_tasks, metavar="A,B", help="count only the conflicts between these tasks (default: all)"
    )
    add_by_option(parser, "count")


def _add_top(parser: Parser) -> None:
    parser.add_argument("--top", type=positive_integer, metavar="N", help="only the first N layers")


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", type=file_path, required=True, metavar="MAP", help="the new conflict map, a JSON file")
