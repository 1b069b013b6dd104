"""`recon bench`: a problem's whole table of results, as in the paper."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon.experiments.bench.presets import PRESETS
from recon_cli.options import layers
from recon_cli.options.outputs import claimed_folder
from recon_cli.options.problem import add_problem, problem_of
from recon_cli.options.recipe import add_accumulate
from recon_cli.options.rename import add_rename_option, renames
from recon_cli.parser import (
    METHOD,
    Report,
    add_device_option,
    add_verb,
    any_path,
    positive_integer,
    positive_number,
    threshold,
)
from recon_cli.progress import say, shows_progress

if TYPE_CHECKING:
    from recon import Problem
    from recon.experiments.bench.presets import Preset
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "bench",
        run,
        "train a problem's whole table: single-task, every method with and without Recon, controls",
        """
        recon bench digits
        recon bench multi-fashion-mnist --data-root data --out bench
        recon bench multi-fashion-mnist --data-root data --preset paper --out bench
        recon bench nyuv2 --data-root data --methods joint cagrad:c=0.4 --controls none --out nyuv2
        recon bench nyuv2 --data-root data --backbone SegNet --map cityscapes.json --out transfer
        """,
        "Profiles once; trains one model for each task, then every method on the plain model and on Recon's, and joint "
        "training on as many layers at random and on the best plan within a budget too. Prints the table in the "
        "paper's layout, with costs and the paper's own figures. After an interruption, the same command goes on.",
    )
    add_problem(parser)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="quick",
        help="quick: a reduced run, of minutes on a CPU (default); paper: the problem's own epochs on all data, three "
        "seeds, five methods: days on a CPU",
    )
    size = parser.add_argument_group("instead of the preset's")
    size.add_argument("--methods", nargs="+", metavar="METHOD", help=METHOD)
    size.add_argument("--seeds", type=positive_integer, metavar="N", help="train everything with N seeds")
    size.add_argument("--epochs", type=positive_integer, help="epochs of every training")
    size.add_argument("--profile-epochs", type=positive_integer, metavar="N", help="epochs of the profile")
    size.add_argument("--train-batches", type=positive_integer, metavar="N", help="use at most N batches an epoch")
    size.add_argument("--test-batches", type=positive_integer, metavar="N", help="use at most N test batches")
    add_accumulate(size)
    which = parser.add_argument_group("which layers")
    which.add_argument(
        "--top-k",
        type=positive_integer,
        metavar="K",
        help="branch K layers (default: the paper's K on its own network, else half of the shared layers)",
    )
    which.add_argument(
        "--threshold",
        type=threshold,
        metavar="S",
        help="a conflict is a cosine below S (default: the problem's own, else -0.1)",
    )
    which.add_argument(
        "--max-macs",
        type=positive_number,
        default=1.25,
        metavar="RATIO",
        help="multiply-adds of the budgeted plan (default: 1.25 times)",
    )
    which.add_argument(
        "--controls",
        choices=("joint", "all", "none"),
        default="joint",
        help="which methods train the random and the budgeted plan too (default: joint)",
    )
    which.add_argument(
        "--map",
        type=any_path,
        metavar="MAP",
        help="a map of this problem replaces the profile; of another data set's map, the plan is trained too: the "
        "paper's Recon*",
    )
    add_rename_option(parser, "the map's layers")
    layers.add_layer_options(parser.add_argument_group("what the profile counts in; all layers train"))
    parser.add_argument(
        "--workers", type=positive_integer, help="trainings at the same time (default: one a core; 1 on a GPU)"
    )
    add_device_option(parser)
    parser.add_argument(
        "--out", type=any_path, default=Path("bench"), metavar="FOLDER", help="where everything goes (default: bench)"
    )


def run(args: argparse.Namespace) -> Report:
    """Run what is missing, and report."""
    if args.rename and not args.map:
        args.parser.error("--rename goes with --map: it renames the map's layers")
    with claimed_folder(args.out, marks=("results.json",)):
        return _run(args)


def _run(args: argparse.Namespace) -> Report:
    given = recon.ConflictMap.load(args.map) if args.map else None
    problem = problem_of(args)
    if given is not None and given.made_by.get("problem") == problem.name and _choice(args):
        args.parser.error(f"--{next(iter(_choice(args)))} is for the profile, but the map in --map takes its place")
    preset = _preset(args, problem)
    for method in preset.methods:
        recon.methods.parse(method)
    if len(set(preset.methods)) < len(preset.methods):
        args.parser.error(f"--methods {' '.join(preset.methods)} names a method twice")
    from recon.experiments.bench import bench
    from recon.experiments.bench.settings import BenchSettings, fingerprint
    from recon.experiments.bench.variants import default_workers
    from recon.experiments.inputs import choose_device, threshold_of
    from recon_cli.interruptions import goes_on_when_given_again
    from recon_cli.texts import bench as bench_report

    device = choose_device(args.device)
    epochs = preset.epochs or problem.epochs
    search = problem.search
    settings = BenchSettings(
        problem_name=args.problem,
        data_root=args.data_root,
        train_samples=args.train_samples,
        pretrained=args.pretrained,
        backbone=problem.backbone,
        preset=preset.name,
        epochs=epochs,
        profile_epochs=preset.profile_epochs or (search.epochs if search else -(-epochs // 4)),
        train_batches=preset.train_batches,
        test_batches=preset.test_batches,
        count_every=preset.count_every,
        threshold=threshold_of(problem, args.threshold),
        recipe=preset.recipe,
        device=device.type,
        **{name: tuple(patterns) for name, patterns in _choice(args).items()},
    )
    top_k, reason = _top_k(args, problem)
    job = bench.Bench(
        settings=settings,
        folder=args.out,
        methods=preset.methods,
        seeds=preset.seeds,
        top_k=top_k,
        max_macs=args.max_macs,
        controls=args.controls,
        given=None if given is None else (given, fingerprint(args.map)),
        rename=renames(args),
        workers=args.workers or default_workers(device),
        rounds=preset.rounds,
        tell=say,
        progress=shows_progress(),
    )
    with goes_on_when_given_again(args):
        return bench_report.report(job, reason)


def _preset(args: argparse.Namespace, problem: Problem) -> Preset:
    preset = PRESETS[args.preset](problem)
    names = ("seeds", "epochs", "profile_epochs", "train_batches", "test_batches")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = replace(preset.recipe, accumulate=args.accumulate)
    return replace(preset, methods=tuple(args.methods or preset.methods), recipe=recipe, **given)


def _choice(args: argparse.Namespace) -> dict[str, list[str]]:
    """Which layers the profile counts in, as far as that is said."""
    return {name: getattr(args, name) for name in layers.NAMES if getattr(args, name) is not None}


def _top_k(args: argparse.Namespace, problem: Problem) -> tuple[int | None, str]:
    """K, where it is known already, and whose choice it is."""
    if args.top_k is not None:
        return args.top_k, "as asked"
    if problem.search is not None and not problem.backbone:
        return problem.search.top_k, "as in the paper"
    return None, "half of the shared ones"
