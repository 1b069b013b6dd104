"""`recon convert`: branches a fresh model's worst layers, and says what that costs."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import recon
from recon.errors import UsageError
from recon.experiments import Run
from recon.experiments.training.run_folder import CHECKPOINT_FILE, RUN_FILES
from recon.support.files.folders import replacing
from recon_cli.options import selection
from recon_cli.options.outputs import claimed_folder
from recon_cli.options.problem import PROBLEM_NAMES, add_problem, problem_of
from recon_cli.options.rename import renames
from recon_cli.parser import Report, add_device_option, add_verb, any_path, command_words, seed
from recon_cli.terminal import tell
from recon_cli.texts.costs import cost_table, with_ratios
from recon_cli.texts.map_fit import fit_data, fit_line, match_map

if TYPE_CHECKING:
    from torch import nn

    from recon import BranchPlan, Costs, Problem, Verification
    from recon.plans import Choice, Match
    from recon_cli.parser import Verbs
    from recon_cli.texts.costs import CostsByName

_ROUNDS = 7  # of timing; each takes a step of either model


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "convert",
        run,
        "give the tasks their own copies of layers, and show what that costs",
        """
        recon convert digits --map map.json --top-k 4 --out branched
        recon convert digits --map map.json --max-macs 1.25 --out cheap
        recon convert digits --map map.json --top-k 4 --select random --seed 1 --out random
        recon convert digits --layers blocks.2.conv1 blocks.2.conv2 --out late
        recon convert digits --map map.json --top-k 4 --init pretrained.pt --out branched
        recon convert digits --backbone ResNet18 --map resnet.json --top-k 4 --out branched
        recon convert digits --map other.json --rename backbone=blocks --top-k 4 --out branched
        """,
        "`recon plan` shows what a choice would cost. The weights are make_model's, unless --init says otherwise. "
        "Train the result with `recon train --model`.",
    )
    add_problem(parser)
    selection.add_options(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the weights and of --select random (default: 0)")
    parser.add_argument(
        "--mode",
        choices=("fan", "per-task"),
        default="fan",
        help="fan: compute once what the tasks share (default); per-task: run the whole network once per task, for a "
        "forward that cannot be branched otherwise",
    )
    parser.add_argument(
        "--init",
        default="copy",
        metavar="FROM",
        help="copy: as make_model gives the model (default); scratch: another draw of make_model; or the path of a "
        "checkpoint of the unbranched model",
    )
    parser.add_argument(
        "--copies",
        choices=("equal", "independent"),
        default="equal",
        help="with --init scratch: whether the copies of one layer start equal (default), or each from its own draw",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not check the branched model on a few samples")
    add_device_option(parser)
    parser.add_argument("--out", type=any_path, required=True, metavar="FOLDER", help="where the branched model goes")


def run(args: argparse.Namespace) -> Report:
    """Plan, convert, save, count and time."""
    _check_options(args)
    with claimed_folder(args.out):
        return _run(args)


def _run(args: argparse.Namespace) -> Report:
    if (args.out / CHECKPOINT_FILE).exists():
        raise UsageError(
            f"{args.out} keeps an interrupted training. Choose another --out, or delete {CHECKPOINT_FILE} there."
        )
    cmap = recon.ConflictMap.load(args.map) if args.map else None
    problem = problem_of(args)
    from recon.branching import plan_of
    from recon.experiments import costs as run_costs
    from recon.experiments.inputs import choose_device, few_samples, first_batch, make_loaders, make_model
    from recon.plans import CostModel  # late: these import torch
    from recon.support.timing import step_seconds

    device = choose_device(args.device)
    plain = make_model(problem, args.seed).to(device)
    found = match_map(cmap, problem, plain, renames(args)) if cmap else None
    loader, _ = make_loaders(problem, args.seed)
    batch = first_batch(problem, loader, device)
    example = few_samples(batch[0].inputs)[0]
    costs = CostModel(plain, problem.task_names, example) if selection.has_budget(args) else None
    choice = selection.choose(args, problem, plain, found, costs)
    init = problem.make_model if args.init == "scratch" else args.init
    branched = recon.convert(plain, choice.plan, example, mode=args.mode, init=init, copies=args.copies)
    verified = None if args.no_verify else recon.verify(plain, branched, example)
    models = {"plain": plain, "branched": branched}
    counted = {name: run_costs.costs_per_sample(model, batch[0].inputs) for name, model in models.items()}
    _save(args, problem, branched, plan_of(branched), counted["branched"])
    tell("Timing training steps of both models ...")
    steps = {name: run_costs.TrainingStep(problem, model, batch) for name, model in models.items()}
    seconds = step_seconds(steps, rounds=_ROUNDS)
    table = {
        name: {
            "parameters": counted[name].parameters,
            "macs": counted[name].macs,
            "activation_bytes": counted[name].activation_bytes,
            "seconds_per_step": seconds[name],
        }
        for name in models
    }
    return _report(args, problem, choice, plan_of(branched), with_ratios(table), verified, found)


def _check_options(args: argparse.Namespace) -> None:
    if args.copies == "independent" and args.init != "scratch":
        args.parser.error("--copies independent needs --init scratch: other weights are the same for every copy")
    selection.check(args)


def _save(args: argparse.Namespace, problem: Problem, branched: nn.Module, plan: BranchPlan, costs: Costs) -> None:
    """Save the model, and an unfinished run from which `recon train` learns how the layers were chosen."""
    run = Run(
        problem=problem.name,
        label=selection.surgery_name(args, plan),
        tasks=problem.task_names,
        method="",
        surgery=selection.surgery_name(args, plan),
        branched_layers=tuple(plan.layers),
        seed=args.seed,
        parameters=costs.parameters,
        macs=costs.macs,
        backbone=problem.backbone,
    )
    with replacing(args.out, RUN_FILES) as new:
        run.save(new)
        recon.save(branched, new)


def _report(
    args: argparse.Namespace,
    problem: Problem,
    choice: Choice,
    plan: BranchPlan,
    costs: dict[str, CostsByName],
    verified: Verification | None,
    found: Match | None,
) -> Report:
    statistics = [path for path in plan.statistics or {} if path not in plan.layers]
    next_command = ["recon", "train", *command_words(args, PROBLEM_NAMES), "--model", str(args.out), "--out", "run"]
    text = [
        *([fit_line(args.map, found), ""] if found else []),
        f"Branched: {choice}.",
        *(f"  {name}" for name in plan.layers),
        *selection.groups_lines(plan.layers),
        f"Shared layers that keep running statistics for each group of tasks: {len(statistics)}",
        *(f"  {path}" for path in statistics),
        "",
        str(verified or "Not verified, as --no-verify asks."),
        "",
        cost_table(costs),
        "",
        f"Saved {args.out}. Next, train it:",
        f"  {shlex.join(next_command)}",
    ]
    data = {
        "folder": str(args.out),
        "problem": problem.name,
        "surgery": selection.surgery_name(args, plan),
        "map": fit_data(args.map, found) if found else None,
        "reason": choice.reason,
        "covered": choice.covered if choice.scores else None,
        "notes": choice.notes,
        "branched_layers": list(plan.layers),
        "groups": {name: partition.groups for name, partition in plan.layers.items()},
        "statistics": statistics,
        "task_modules": {path: list(tasks) for path, tasks in (plan.task_modules or {}).items()},
        "mode": plan.mode,
        "verified": asdict(verified) if verified else None,
        "costs": costs,
    }
    return Report("\n".join(text), data)
