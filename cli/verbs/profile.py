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
from recon.errors import MapFileError
from recon.experiments.training.run_folder import epoch_line
from recon.support import launch
from recon.support.tables import counted
from recon_cli.options import layers
from recon_cli.options.outputs import claimed_file
from recon_cli.options.problem import PROBLEM_NAMES, add_problem, problem_of
from recon_cli.options.recipe import add_step_options
from recon_cli.parser import (
    METHOD,
    Report,
    add_training_options,
    add_verb,
    command_words,
    file_path,
    floor,
    positive_integer,
    share,
    threshold,
)
from recon_cli.progress import shows_progress
from recon_cli.terminal import tell
from recon_cli.texts.map_show import FLOOR, met_text, nothing_text, ranked_layers, ranking_table, unsure_why

if TYPE_CHECKING:
    import torch

    from recon import ConflictMap, Problem
    from recon.profiling.floor import FloorEvery
    from recon_cli.parser import Verbs

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
        recon profile digits --until-stable 0.9 --top-k 8 --out map.json
        recon profile digits --backbone ResNet18 --out resnet.json
        recon profile digits --backbone ResNet18 --exclude '.*bn\\d' --units 'layer\\d+\\.\\d+' --out blocks.json
        recon profile digits --floor 4 --out map.json
        recon profile digits --clip 1 --amp bf16 --out map.json
        recon profile three_loaders.py:problem --accumulate tasks --out map.json
        recon profile digits --out map.json --resume
        torchrun --nproc-per-node 2 -m recon_cli profile digits --out map.json
        """,
        "Until it is done, MAP.checkpoint keeps the training, and the map holds what was counted so far. Ctrl-C keeps "
        "both up to the last step, and whatever else ends the training keeps the last ones saved.",
    )
    add_problem(parser)
    parser.add_argument("--epochs", type=positive_integer, default=3, help="epochs of warm-up training (default: 3)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        metavar="S",
        help="a conflict is a cosine below S, a multiple of 0.01 in (-1, 0] (default: the problem's own, else -0.1); "
        "the map answers for every other S too",
    )
    parser.add_argument("--method", default="joint", help=f"{METHOD} (default: joint)")
    add_training_options(parser)
    add_step_options(parser.add_argument_group("how a step is taken"))
    parser.add_argument(
        "--until-stable",
        type=share,
        metavar="OVERLAP",
        help="stop once the top K are expected to overlap by this part with those of all epochs, such as 0.9",
    )
    parser.add_argument(
        "--top-k",
        type=positive_integer,
        metavar="K",
        help="K of --until-stable and of the ranking (default: a quarter of the layers)",
    )
    parser.add_argument(
        "--every", type=positive_integer, default=1, metavar="N", help="profile only every N-th step (default: 1)"
    )
    parser.add_argument(
        "--memory",
        choices=("exact", "sketch"),
        default="exact",
        help="exact: hold the gradients of all tasks at once; sketch: one gradient's memory for any number of tasks, "
        "cosines to about 0.02 (default: exact)",
    )
    parser.add_argument(
        "--floor",
        type=floor,
        default="auto",
        metavar="N",
        help="take the noise floor at every N-th profiled step, N of at least 2, where each task is compared with "
        "itself on two batches; or off (default: every 12th, which makes a profile up to 15 %% dearer)",
    )
    layers.add_layer_options(parser.add_argument_group("which layers are counted; all of them train"))
    parser.add_argument("--out", type=file_path, required=True, metavar="MAP", help="the conflict map, a JSON file")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from MAP.checkpoint, to the same map; without one, start from the beginning",
    )


def run(args: argparse.Namespace) -> Report:
    """Profile, save the map, show the ranking's top."""
    with claimed_file(args.out, b'"recon conflict map"') as begins:
        return _run(args, begins)


def _run(args: argparse.Namespace, begins: bool) -> Report:
    problem = problem_of(args)
    recon.methods.parse(args.method)
    from recon.experiments.inputs import choose_device
    from recon.training.checkpoints import checkpoint_beside  # late: these import torch
    from recon_cli.interruptions import check_resume, resumable

    check_resume(args)

    device = choose_device(args.device)
    checkpoint = checkpoint_beside(args.out)
    finished = _finished_map(args.out)
    # A profile that was killed before it saved anything was going to replace the map that is there.
    resumes = args.resume and not checkpoint.exists() and not begins
    if finished is not None and resumes and _is_ours(finished, args, problem):
        tell(f"{args.out} is finished; there is nothing to resume.")
        return _report(args, problem, finished)
    if finished is not None:
        tell(f"note: the map in {args.out} will be replaced when the new one is finished.")
    with launch.joined(device), resumable(args, [checkpoint]):
        cmap = _profile(args, problem, device, checkpoint)
        if launch.number() == 0:
            cmap.save(args.out)
    return _report(args, problem, cmap)


def _profile(args: argparse.Namespace, problem: Problem, device: torch.device, checkpoint: Path) -> ConflictMap:
    from recon.experiments import Recipe, optimizers
    from recon.experiments.backbones import backbone_title
    from recon.experiments.inputs import make_loaders, make_model, threshold_of
    from recon.profiling.preflight import refuse_unprofilable
    from recon.training import RankBatches  # late: these import torch

    model = make_model(problem, args.seed).to(device)
    loader, _ = make_loaders(problem, args.seed, device)
    several = launch.count() > 1
    if not several:
        chosen = {name: getattr(args, name) for name in layers.NAMES}
        refuse_unprofilable(model, loader, problem.losses, args.accumulate, **chosen)
    subset = {} if args.train_samples is None else {"train_samples": args.train_samples}
    made_by = {
        "problem": problem.name,
        **subset,
        "backbone": backbone_title(problem, model),
        "seed": args.seed,
        "device": device.type,
        **({"processes": launch.count()} if several else {}),
        "recon": version("recon-mtl"),
        "python": platform.python_version(),
    }
    settings = {
        "problem": problem.name,
        "PROBLEM": problems.home_of(args.problem),
        **{f"--{name}": getattr(args, name.replace("-", "_")) for name in ("train-samples", "seed", "lr", "method")},
        "--backbone": problem.backbone or None,
        "--device": device.type,
    }
    return recon.profile(
        model,
        RankBatches(loader) if several else loader,
        problem.losses,
        optimizer=optimizers.make_optimizer(problem, model, Recipe(lr=args.lr)),
        epochs=args.epochs,
        threshold=threshold_of(problem, args.threshold),
        method=args.method,
        clip=args.clip,
        accumulate=args.accumulate,
        amp=args.amp,
        every=args.every,
        until_stable=args.until_stable,
        top_k=args.top_k,
        memory=args.memory,
        floor=_floor(args),
        layers=args.layers,
        exclude=args.exclude,
        units=args.units,
        made_by=made_by,
        on_epoch=lambda epoch: tell(epoch_line(epoch, args.epochs)),
        progress=shows_progress(),
        checkpoint=None if several else checkpoint,
        resume=args.resume,
        settings=settings,
        # A finished map of an earlier profile stays until this one is finished.
        on_checkpoint=lambda cmap: None if _finished_map(args.out) else cmap.save(args.out),
    )


def _floor(args: argparse.Namespace) -> FloorEvery:
    return None if args.floor == "off" else args.floor


def _finished_map(path: Path) -> ConflictMap | None:
    try:
        cmap = recon.ConflictMap.load(path)
    except MapFileError:
        return None
    return None if cmap.unfinished else cmap


def _is_ours(cmap: ConflictMap, args: argparse.Namespace, problem: Problem) -> bool:
    """Whether the finished map is what the command would make, as far as the map says how it was made."""
    from recon.experiments import Recipe, optimizers
    from recon.experiments.backbones import backbone_title
    from recon.experiments.inputs import make_model, threshold_of
    from recon.profiling.floor import floor_steps
    from recon.training.optimizers import as_one

    model = make_model(problem, args.seed)
    group = as_one(optimizers.make_optimizer(problem, model, Recipe(lr=args.lr))).param_groups[0]
    asked = {
        "problem": problem.name,
        "train_samples": args.train_samples,
        "backbone": backbone_title(problem, model),
        "learning_rate": group.get("initial_lr", group.get("lr")),
        "accumulate": args.accumulate if args.accumulate != 1 else None,
        "memory": args.memory if args.memory != "exact" else None,
        "every": args.every if args.every != 1 else None,
        "floor_every": floor_steps(_floor(args)),
        "processes": launch.count() if launch.count() > 1 else None,
        **{
            name: getattr(args, name)
            for name in ("seed", "method", "epochs", "until_stable", "clip", "amp", *layers.NAMES)
        },
    }
    same = all(cmap.made_by.get(name) == value for name, value in asked.items())
    return same and cmap.threshold == threshold_of(problem, args.threshold)


def _report(args: argparse.Namespace, problem: Problem, cmap: ConflictMap) -> Report:
    unsure = unsure_why(cmap)
    top_k = min(args.top_k or max(1, len(cmap.layers) // 4), len(cmap.layers))
    ranked = ranked_layers(cmap, top_k=top_k)
    nothing = nothing_text(cmap, ranked)
    next_command = ["recon", "convert", *command_words(args, PROBLEM_NAMES), "--map", str(args.out)]
    next_command += ["--top-k", str(top_k), "--out", "branched"]
    text = [
        f"{counted(len(ranked), 'shared layer')}, {counted(cmap.steps or 0, 'step')}, {cmap.skipped} skipped. "
        f"Score: how often a cosine was below {cmap.threshold:g}.",
        "",
        ranking_table(ranked, max(_TOP, top_k + 2), top_k=top_k),
        *([unsure] if unsure else []),
        *([met_text(cmap)] if met_text(cmap) else []),
        *([FLOOR] if cmap.has_floor else []),
        "",
        *_next(args, nothing, shlex.join(next_command)),
    ]
    data = {
        "map": str(args.out),
        "problem": problem.name,
        "tasks": cmap.tasks,
        "threshold": cmap.threshold,
        "steps": cmap.steps,
        "skipped": cmap.skipped,
        "top_k": top_k,
        "conflict": not nothing,
        "layers": ranked,
    }
    return Report("\n".join(text), data)


def _next(args: argparse.Namespace, nothing: str, command: str) -> list[str]:
    if nothing:
        return [f"Saved {args.out}. {nothing} Train the model as it is."]
    return [f"Saved {args.out}. Next, branch the worst layers:", f"  {command}"]
