"""`recon profile`: warm-up training that writes a conflict map."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon import problems
from recon_cli.outputs import check_file
from recon_cli.parsing import (
    METHOD,
    PROBLEM,
    Report,
    add_training_options,
    add_verb,
    positive_integer,
    threshold,
)
from recon_cli.ranking import ranked_layers, ranking_table

if TYPE_CHECKING:
    from recon_cli.parsing import Verbs

_TOP = 10


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "profile",
        run,
        "train for a few epochs and count, in every shared layer, how often the tasks' gradients conflict",
        """
        recon profile digits --out map.json
        recon profile digits --epochs 1 --threshold -0.05 --seed 1 --out map1.json
        recon profile examples/own_problem.py:problem --method pcgrad --out map.json
        """,
    )
    parser.add_argument("problem", metavar="PROBLEM", help=PROBLEM)
    parser.add_argument("--epochs", type=positive_integer, default=3, help="of warm-up training (default: 3)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        default=-0.1,
        metavar="S",
        help="a conflict is a cosine below S, a multiple of 0.01 in (-1, 0] (default: -0.1); the map answers for "
        "every other S too",
    )
    parser.add_argument("--method", default="joint", help=f"{METHOD} (default: joint)")
    add_training_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="MAP", help="the conflict map, a JSON file")


def run(args: argparse.Namespace) -> Report:
    """Profile, save the map, show the ranking's top."""
    check_file(args.out, b'"recon conflict map"')
    problem = problems.get(args.problem)
    recon.methods.parse(args.method)
    from recon_cli import workbench  # late: it imports torch

    device = workbench.choose_device(args.device)
    model = workbench.make_model(problem, args.seed).to(device)
    loader, _ = workbench.make_loaders(problem, args.seed)
    made_by = {
        "problem": problem.name,
        "backbone": type(model).__name__,
        "seed": args.seed,
        "device": device.type,
        "recon": version("recon-mtl"),
        "python": platform.python_version(),
    }
    cmap = recon.profile(
        model,
        loader,
        problem.losses,
        optimizer=workbench.make_optimizer(problem, model, args.lr),
        epochs=args.epochs,
        threshold=args.threshold,
        method=args.method,
        made_by=made_by,
        on_epoch=lambda epoch: workbench.show_epoch(epoch, args.epochs),
        progress=workbench.shows_progress(),
    )
    cmap.save(args.out)
    layers = ranked_layers(cmap)
    count = str(max(1, len(layers) // 4))
    next_command = ["recon", "convert", args.problem, "--map", str(args.out), "--top-k", count, "--out", "branched"]
    text = [
        f"{len(layers)} shared layers, {cmap.steps} steps, {cmap.skipped} skipped. "
        f"Score: how often a cosine was below {cmap.threshold:g}.",
        "",
        ranking_table(layers, _TOP),
        "",
        f"Saved {args.out}. Next, branch the worst layers:",
        f"  {shlex.join(next_command)}",
    ]
    data = {
        "map": str(args.out),
        "problem": problem.name,
        "tasks": cmap.tasks,
        "threshold": cmap.threshold,
        "steps": cmap.steps,
        "skipped": cmap.skipped,
        "layers": layers,
    }
    return Report("\n".join(text), data)
