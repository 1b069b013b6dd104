"""`recon convert`: branches a fresh model's worst layers, and says what that costs."""

from __future__ import annotations

import argparse
import copy
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recon
from recon import problems
from recon.errors import MapMismatchError
from recon.runs import Run
from recon.tables import short_number, text_table
from recon_cli.outputs import check_folder
from recon_cli.parsing import PROBLEM, Report, add_device_option, add_verb, positive_integer, seed, threshold

if TYPE_CHECKING:
    import torch
    from torch import nn

    from recon.problem import Batch, Problem
    from recon_cli.parsing import Verbs

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
        recon convert digits --map map.json --top-k 4 --select random --seed 1 --out random
        recon convert digits --layers blocks.2.conv1 blocks.2.conv2 --out late
        """,
        "The model is freshly initialised: train the result with `recon train --model`.",
    )
    parser.add_argument("problem", metavar="PROBLEM", help=PROBLEM)
    parser.add_argument("--map", type=Path, metavar="MAP", help="the conflict map that chooses the layers")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--top-k", type=positive_integer, metavar="K", help="branch K layers of the map")
    which.add_argument("--layers", nargs="+", metavar="NAME", help="branch these layers; needs no map")
    parser.add_argument("--select", choices=("top", "random"), help="the highest scores (default), or K at random")
    parser.add_argument("--threshold", type=threshold, metavar="S", help="score at another S (default: the map's own)")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and of --select random (default: 0)")
    add_device_option(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the branched model goes")


def run(args: argparse.Namespace) -> Report:
    """Plan, convert, save, count and time."""
    _check_options(args)
    check_folder(args.out)
    cmap = recon.ConflictMap.load(args.map) if args.map else None
    problem = problems.get(args.problem)
    from recon_cli import workbench  # late: it imports torch

    device = workbench.choose_device(args.device)
    model = workbench.make_model(problem, args.seed)
    plan = _plan(args, problem, model, cmap)
    loader, _ = workbench.make_loaders(problem, args.seed)
    batch = workbench.first_batch(problem, loader, device)
    few, _ = workbench.few_samples(batch[0])
    branched = recon.convert(model.to(device), plan, few)
    models = {"plain": model, "branched": branched}
    costs = {name: workbench.costs_per_sample(each, batch[0]) for name, each in models.items()}
    plan = branched.branch_plan
    record = Run(
        problem=problem.name,
        label=_surgery(args),
        tasks=problem.task_names,
        method="",
        surgery=_surgery(args),
        branched_layers=tuple(plan.layers),
        seed=args.seed,
        parameters=costs["branched"].parameters,
        macs=costs["branched"].macs,
    )
    record.save(args.out)
    recon.save(branched, args.out)
    seconds = _time_steps(problem, models, batch)
    table = {
        name: {"parameters": costs[name].parameters, "macs": costs[name].macs, "seconds_per_step": seconds[name]}
        for name in models
    }
    return _report(args, record, branched, table)


def _check_options(args: argparse.Namespace) -> None:
    if args.map is None:
        if args.top_k:
            args.parser.error("--top-k needs --map MAP: `recon profile` makes one")
        if args.threshold is not None:
            args.parser.error("--threshold needs --map MAP, and --top-k")
    if args.layers and args.select:
        args.parser.error("--select goes with --top-k, not with --layers")


def _plan(
    args: argparse.Namespace, problem: Problem, model: nn.Module, cmap: recon.ConflictMap | None
) -> recon.BranchPlan:
    if cmap is None:
        return recon.BranchPlan.per_task(args.layers, problem.task_names).on(model)
    if set(cmap.tasks) != set(problem.task_names):
        raise MapMismatchError(
            f"{args.map} was made for the tasks {list(cmap.tasks)}, but {problem.name!r} has "
            f"{list(problem.task_names)}. Profile this problem, or take the map made for it."
        )
    if args.layers:
        return recon.plan(cmap, model, layers=args.layers)
    select = args.select or "top"
    return recon.plan(cmap, model, top_k=args.top_k, threshold=args.threshold, select=select, seed=args.seed)


def _surgery(args: argparse.Namespace) -> str:
    if args.layers:
        return f"K={len(args.layers)} by name"
    return f"{'random' if args.select == 'random' else 'Recon'} K={args.top_k}"


def _time_steps(problem: Problem, models: dict[str, nn.Module], batch: Batch) -> dict[str, float]:
    """Median seconds of a joint training step of each model, the two timed in turn."""
    from recon.timing import step_seconds

    return step_seconds({name: _Step(problem, model, batch) for name, model in models.items()}, rounds=_ROUNDS)


class _Step:
    """One training step after the other, on a copy of the model."""

    def __init__(self, problem: Problem, model: nn.Module, batch: Batch) -> None:
        self.model = copy.deepcopy(model).train()
        self.losses = problem.losses
        self.optimizer: torch.optim.Optimizer = problem.make_optimizer(self.model.parameters())
        self.inputs, self.targets = batch

    def __call__(self) -> None:
        from recon.trainer import task_losses

        self.optimizer.zero_grad()
        recon.backward(task_losses(self.model, self.inputs, self.targets, self.losses), self.model)
        self.optimizer.step()


def _report(
    args: argparse.Namespace, record: Run, branched: nn.Module, costs: dict[str, dict[str, Any]]
) -> Report:
    plan = branched.branch_plan
    statistics = [path for path in plan.statistics or {} if path not in plan.layers]
    plain, other = costs["plain"], costs["branched"]
    ratio = {name: other[name] / plain[name] if plain[name] else None for name in plain}
    shown = {
        "parameters": ("parameters", short_number),
        "macs": ("multiply-adds per sample, forward", short_number),
        "seconds_per_step": ("training step, ms", lambda seconds: f"{1000 * seconds:.1f}"),
    }
    rows = [
        [title, text(plain[name]), text(other[name]), f"{ratio[name]:.2f}x" if ratio[name] else "-"]
        for name, (title, text) in shown.items()
    ]
    next_command = ["recon", "train", args.problem, "--model", str(args.out), "--out", "run"]
    text = [
        f"{len(plan.layers)} layers branched, a copy for each of the tasks {', '.join(plan.tasks)}:",
        *(f"  {name}" for name in plan.layers),
        f"{len(statistics)} shared layers keep running statistics for each group of tasks:" if statistics else "",
        *(f"  {name}" for name in statistics),
        "",
        text_table(["cost", "plain", "branched", "ratio"], rows),
        "",
        f"Saved {args.out}. Next, train it:",
        f"  {shlex.join(next_command)}",
    ]
    data = {
        "folder": str(args.out),
        "problem": record.problem,
        "surgery": record.surgery,
        "branched_layers": list(plan.layers),
        "statistics": statistics,
        "task_modules": {path: list(tasks) for path, tasks in (plan.task_modules or {}).items()},
        "costs": {**costs, "ratio": ratio},
    }
    return Report("\n".join(line for line in text if line is not None), data)
