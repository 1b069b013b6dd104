"""What plans are worth: accuracy and Δm of a budgeted plan beside Recon's top K, the controls and joint training.

    python benchmarks/plans.py --out plans.json                              # digits, three seeds
    python benchmarks/plans.py --problems digits multi-fashion-mnist --data-root DATA --out plans.json
    python benchmarks/plans.py --out plans.json --runs 5                     # five more, then the table so far

Digits take about ten minutes on two CPU cores, the other problem about fifteen. Every training is kept in the file as
soon as it is done, and is not done again. Recon branches as large a part of the shared layers as its authors do (25 of
41), or more, up to where the multiply-adds have doubled. The controls are compared at Recon's K, at the budgeted
plan's parameters, or within its budget (`--controls`); each seed has a random choice of its own. One profile, of seed
0, ranks the layers for all seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

import recon
from recon import ConflictMap, problems
from recon.experiments import costs as run_costs
from recon.experiments import inputs as workbench
from recon.experiments.backbones import with_backbone
from recon.experiments.optimizers import make_optimizer, make_scheduler
from recon.experiments.recipe import Recipe
from recon.experiments.run import SINGLE_TASK
from recon.plans.matching import match
from recon.plans.planning import Choice, choose
from recon.plans.selection import Selection
from recon.problems.problem import Problem
from recon.support.files.whole import write_text
from recon.support.tables import short_number, text_table, with_ratio
from recon.support.timing import step_seconds
from recon.training.evaluation import directions

PAPER = 25 / 41  # of the shared layers of ResNet-18 are branched
DOUBLE = 1.95  # times the multiply-adds
CONTROLS = ("random", "first", "last")


@dataclass(frozen=True)
class Study:
    """One problem and how it is trained.

    Args:
        name: the problem's.
        epochs: of every training.
        profile_epochs: of the profile.
        train_samples: how many training samples to use; all if not given.
        backbone: the network; the problem's own if empty.
        data_root: where its data are.
    """

    name: str
    epochs: int
    profile_epochs: int
    train_samples: int | None = None
    backbone: str = ""
    data_root: str | None = None

    def problem(self) -> Problem:
        """The problem, with this backbone."""
        options = {"data_root": self.data_root, "train_samples": self.train_samples}
        return with_backbone(problems.get(self.name, **options), self.backbone)

    def settings(self) -> dict[str, Any]:
        """What runs that are compared must have in common."""
        return {name: value for name, value in asdict(self).items() if name != "data_root"}


STUDIES = {
    "digits": Study("digits", epochs=12, profile_epochs=3),
    # The problem's own network, ResNet-18, is out of reach for two cores: --backbone ResNet18 where there are more.
    "multi-fashion-mnist": Study("multi-fashion-mnist", 4, 2, train_samples=10_000, backbone="SmallResNet"),
}


@dataclass(frozen=True)
class Variant:
    """One way to train: single-task, joint, or joint with a plan for each seed."""

    label: str
    choices: tuple[Choice, ...] = ()

    def model(self, problem: Problem, seed: int, example: Any) -> nn.Module:
        """A fresh model, branched if there is a plan for it."""
        model = workbench.make_model(problem, seed)
        return recon.convert(model, self.choices[seed].plan, example) if self.choices else model


class Ledger:
    """The file that keeps what was measured, by problem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, study: Study) -> dict[str, Any]:
        """The problem's entry. Trainings of other lengths are not mixed."""
        entry = self.data.setdefault(study.name, {"settings": study.settings(), "runs": {}, "seconds_per_step": {}})
        if entry["settings"] != study.settings():
            sys.exit(
                f"{self.path} was measured with {entry['settings']}, not {study.settings()}. Choose another --out."
            )
        return entry

    def save(self) -> None:
        """Write it, atomically."""
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")


class Bench:
    """All variants of one problem.

    Args:
        study: the problem.
        seeds: how often each is trained.
        budget: of the multiply-adds.
        controls: what the controls have in common with the plans.
        out: the file of the results; the conflict map is, or goes, beside it.
    """

    def __init__(self, study: Study, seeds: int, budget: float, controls: Sequence[str], out: Path) -> None:
        self.study, self.seeds, self.budget, self.controls = study, seeds, budget, controls
        self.problem = study.problem()
        self.map_path = out.with_suffix(f".{self.problem.name}.map.json")

    @cached_property
    def batch(self) -> Any:
        """One training batch."""
        return workbench.first_batch(self.problem, workbench.make_loaders(self.problem, 0)[0], torch.device("cpu"))

    @cached_property
    def cmap(self) -> ConflictMap:
        """The conflict map, profiled unless it is there."""
        if not self.map_path.exists():
            print(f"{self.study.name}: profiling", file=sys.stderr)
            model = workbench.make_model(self.problem, 0)
            loader, _ = workbench.make_loaders(self.problem, 0)
            optimizer = make_optimizer(self.problem, model, Recipe())
            cmap = recon.profile(
                model, loader, self.problem.losses, optimizer=optimizer, epochs=self.study.profile_epochs
            )
            cmap.save(self.map_path)
        return ConflictMap.load(self.map_path)

    @cached_property
    def variants(self) -> list[Variant]:
        """What is compared."""
        from recon.plans.costing.cost_model import CostModel

        tasks, seeds = self.problem.task_names, range(self.seeds)
        model = workbench.make_model(self.problem, 0)
        costs = CostModel(model, tasks, workbench.few_samples(self.batch[0])[0])
        found = match(self.cmap, model)

        def choice(**how: Any) -> Choice:
            return choose(found, model, Selection(**how), tasks, costs=costs)

        k = max(1, round(PAPER * len(found.matched)))
        while k < len(found.matched) and costs.of(choice(top_k=k).plan.layers).macs_ratio < DOUBLE:
            k += 1
        budgeted = choice(max_macs=self.budget)
        limits: dict[str, tuple[str, dict[str, Any]]] = {
            "k": (f"K={k}", {"top_k": k}),
            "parameters": ("at those parameters", {"like": budgeted.plan}),
            "budget": (f"max_macs={self.budget:g}", {"max_macs": self.budget}),
        }
        variants = [
            Variant(SINGLE_TASK),
            Variant("joint"),
            Variant(f"Recon K={k}", (choice(top_k=k),) * self.seeds),
            Variant(f"max_macs={self.budget:g}", (budgeted,) * self.seeds),
        ]
        for what, how in (limits[name] for name in self.controls):
            variants += [
                Variant(f"{control} {what}", tuple(choice(select=control, seed=seed, **how) for seed in seeds))
                for control in CONTROLS
            ]
        return variants

    def missing(self, runs: Mapping[str, Any]) -> list[tuple[Variant, int]]:
        """What is yet to be trained, seed by seed."""
        jobs = [(variant, seed) for seed in range(self.seeds) for variant in self.variants]
        return [(variant, seed) for variant, seed in jobs if run_name(variant, seed) not in runs]

    def time_steps(self, rounds: int) -> dict[str, float]:
        """Seconds of a joint training step of each variant's first plan, in turn."""
        example = workbench.few_samples(self.batch[0])[0]
        models = {v.label: v.model(self.problem, 0, example) for v in self.variants if v.label != SINGLE_TASK}
        steps = {label: run_costs.TrainingStep(self.problem, model, self.batch) for label, model in models.items()}
        return step_seconds(steps, rounds)

    def table(self, entry: Mapping[str, Any]) -> str:
        """Means and spreads of what was measured so far."""
        runs = {
            v.label: [run for s in range(self.seeds) if (run := entry["runs"].get(run_name(v, s)))]
            for v in self.variants
        }
        baselines = {run["seed"]: run["results"] for run in runs[SINGLE_TASK]}
        joint = (runs["joint"] or [{}])[0]
        rows = []
        for label, done in runs.items():
            deltas = [self._delta_m(run, baselines[run["seed"]]) for run in done if run["seed"] in baselines]
            rows.append(
                [
                    label,
                    str(len(done)),
                    *(spread([self._accuracy(run, task) for run in done], 2) for task in self.problem.task_names),
                    spread([fmean(self._accuracy(run, task) for task in run["results"]) for run in done], 2),
                    spread(deltas, 2),
                    "/".join(sorted({str(len(run["layers"])) for run in done}, key=int)) or "-",
                    f"{100 * fmean(run['covered'] for run in done):.0f}" if done else "-",
                    *(cost(done, joint, what) for what in ("parameters", "macs")),
                    milliseconds(entry["seconds_per_step"], label),
                ]
            )
        header = ["plan", "seeds", *self.problem.task_names, "mean accuracy %", "Δm %", "layers", "conflict covered %"]
        return text_table([*header, "parameters", "multiply-adds", "ms/step"], rows)

    def _accuracy(self, run: Mapping[str, Any], task: str) -> float:
        return 100 * next(iter(run["results"][task].values()))

    def _delta_m(self, run: Mapping[str, Any], baseline: Any) -> float:
        return recon.delta_m(run["results"], baseline, directions(self.problem.tasks))


def run_name(variant: Variant, seed: int) -> str:
    """The training's name in the file."""
    return f"{variant.label}, seed {seed}"


def train(study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    """Train, evaluate and count one variant."""
    problem = study.problem()
    loader, _ = workbench.make_loaders(problem, seed)
    inputs, _ = workbench.first_batch(problem, loader, torch.device("cpu"))
    model = variant.model(problem, seed, workbench.few_samples(inputs)[0])
    if variant.label == SINGLE_TASK:
        costs = run_costs.single_task_costs(model, problem.task_names, inputs)
        results: dict[str, Any] = {}
        for task in problem.task_names:
            results |= fit(study, problem, variant.model(problem, seed, None), seed, [task])
    else:
        costs = run_costs.costs_per_sample(model, inputs)
        results = fit(study, problem, model, seed, problem.task_names)
    made = variant.choices[seed] if variant.choices else None
    plan = {"layers": list(made.plan.layers) if made else [], "covered": made.covered if made else 0.0}
    return {"seed": seed, "results": results, **plan, **asdict(costs)}


def fit(study: Study, problem: Problem, model: nn.Module, seed: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Train a model on some tasks, and evaluate it."""
    loader, test = workbench.make_loaders(problem, seed)
    torch.manual_seed(seed)
    recon.train(
        model,
        loader,
        {task: loss for task, loss in problem.losses.items() if task in tasks},
        optimizer=make_optimizer(problem, model, Recipe()),
        scheduler=make_scheduler(problem, loader, study.epochs),
        epochs=study.epochs,
    )
    return recon.evaluate(model, test, [task for task in problem.tasks if task.name in tasks])


def trained(
    study: Study, jobs: Sequence[tuple[Variant, int]], workers: int
) -> Iterator[tuple[Variant, int, dict[str, Any]]]:
    """Train, several at a time, each on one thread."""
    if workers == 1:
        yield from ((variant, seed, train(study, variant, seed)) for variant, seed in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(train, study, variant, seed): (variant, seed) for variant, seed in jobs}
        try:
            yield from ((*futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def cost(runs: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], what: str) -> str:
    """The mean cost, and its ratio to joint training's."""
    if not runs:
        return "-"
    mean = fmean(run[what] for run in runs)
    return with_ratio(short_number(mean), mean / reference[what] if reference else None)


def milliseconds(seconds: Mapping[str, float], label: str) -> str:
    """The step time, and its ratio to joint training's."""
    if label not in seconds:
        return "-"
    return with_ratio(f"{1000 * seconds[label]:.1f}", seconds[label] / seconds["joint"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits"], choices=STUDIES, metavar="NAME")
    parser.add_argument("--data-root", help="where the data of multi-fashion-mnist are")
    parser.add_argument("--out", type=Path, required=True, help="the file that keeps the results; maps go beside it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1.25, help="of the multiply-adds, a ratio")
    parser.add_argument("--controls", nargs="+", default=["k"], choices=("k", "parameters", "budget"))
    parser.add_argument("--runs", type=int, help="run at most so many trainings now")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    for option in ("--epochs", "--profile-epochs", "--train-samples"):
        parser.add_argument(option, type=int, help="instead of the problem's own here")
    parser.add_argument("--backbone", help="instead of the problem's own here: SmallResNet, ResNet18")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ledger, left = Ledger(args.out), args.runs
    for name in args.problems:
        given = {o: getattr(args, o) for o in ("epochs", "profile_epochs", "train_samples", "backbone", "data_root")}
        study = replace(STUDIES[name], **{option: value for option, value in given.items() if value is not None})
        entry = ledger.of(study)
        bench = Bench(study, args.seeds, args.budget, args.controls, args.out)
        jobs = bench.missing(entry["runs"])[:left]
        left = None if left is None else left - len(jobs)
        for number, (variant, seed, run) in enumerate(trained(study, jobs, args.workers), start=1):
            entry["runs"][run_name(variant, seed)] = run
            ledger.save()
            print(f"{name}: {number} of {len(jobs)}: {run_name(variant, seed)}", file=sys.stderr)
        if (
            not bench.missing(entry["runs"])
            and {v.label for v in bench.variants[1:]} - entry["seconds_per_step"].keys()
        ):
            entry["seconds_per_step"] = bench.time_steps(args.rounds)
            ledger.save()
        print(f"{name}: {study.settings()}, mean ± standard deviation over seeds\n{bench.table(entry)}\n", flush=True)


if __name__ == "__main__":
    main()
