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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import recon
from recon import ConflictMap
from recon.experiments import BenchSettings, Variant, make_loaders, make_model
from recon.experiments import costs as run_costs
from recon.experiments.bench.variants import in_turn_or_parallel, time_steps
from recon.experiments.comparison_rows import spread
from recon.experiments.inputs import example_inputs
from recon.experiments.optimizers import make_optimizer, make_scheduler
from recon.experiments.run import SINGLE_TASK
from recon.plans import Choice, CostModel, Selection, choose, match
from recon.support.files.whole import write_text
from recon.support.tables import short_number, text_table, with_ratio
from recon.training.evaluation import directions

PAPER = 25 / 41  # of the shared layers of ResNet-18 are branched
DOUBLE = 1.95  # times the multiply-adds
CONTROLS = ("random", "first", "last")
CPU = torch.device("cpu")


def study(name: str, epochs: int, profile_epochs: int, **given: Any) -> BenchSettings:
    """A problem, and how its networks are trained here."""
    return BenchSettings(
        problem_name=name, preset="plans", device="cpu", epochs=epochs, profile_epochs=profile_epochs, **given
    )


STUDIES = {
    "digits": study("digits", 12, 3),
    # The problem's own network, ResNet-18, is out of reach for two cores: --backbone ResNet18 where there are more.
    "multi-fashion-mnist": study("multi-fashion-mnist", 4, 2, train_samples=10_000, backbone="SmallResNet"),
}


class Ledger:
    """The file that keeps what was measured, by problem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, settings: BenchSettings) -> dict[str, Any]:
        """The problem's entry. Trainings of other lengths are not mixed."""
        own = json.loads(json.dumps(settings.as_dict()))
        entry = self.data.setdefault(settings.problem_name, {"settings": own, "runs": {}, "seconds_per_step": {}})
        if entry["settings"] != own:
            sys.exit(f"{self.path} was measured with {entry['settings']}, not {own}. Choose another --out.")
        return entry

    def save(self) -> None:
        """Write it, atomically."""
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")


@dataclass(frozen=True)
class Job:
    """One training; it can be pickled."""

    settings: BenchSettings
    variant: Variant
    seed: int
    covered: float  # the share of the conflict that the plan covers

    @property
    def name(self) -> str:
        """The training's name in the file."""
        return f"{title(self.variant)}, seed {self.seed}"


def title(variant: Variant) -> str:
    """What the table calls it: every plan is trained jointly."""
    return variant.surgery or variant.method


class Bench:
    """All variants of one problem.

    Args:
        settings: the problem, and how it is trained.
        seeds: how often each is trained.
        budget: of the multiply-adds.
        controls: what the controls have in common with the plans.
        out: the file of the results; the conflict map is, or goes, beside it.
    """

    def __init__(self, settings: BenchSettings, seeds: int, budget: float, controls: Sequence[str], out: Path) -> None:
        self.settings, self.seeds, self.budget, self.controls = settings, seeds, budget, controls
        self.problem = settings.problem()
        self.map_path = out.with_suffix(f".{self.problem.name}.map.json")

    @cached_property
    def cmap(self) -> ConflictMap:
        """The conflict map, profiled unless it is there."""
        if not self.map_path.exists():
            print(f"{self.settings.problem_name}: profiling", file=sys.stderr)
            model, (loader, _) = make_model(self.problem, 0), make_loaders(self.problem, 0)
            optimizer = make_optimizer(self.problem, model, self.settings.recipe)
            cmap = recon.profile(
                model, loader, self.problem.losses, optimizer=optimizer, epochs=self.settings.profile_epochs
            )
            cmap.save(self.map_path)
        return ConflictMap.load(self.map_path)

    @cached_property
    def jobs(self) -> list[Job]:
        """Every training, seed by seed."""
        tasks, seeds = self.problem.task_names, range(self.seeds)
        model = make_model(self.problem, 0)
        costs = CostModel(model, tasks, example_inputs(self.problem, 0))
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
        by_surgery = {f"Recon K={k}": [choice(top_k=k)] * self.seeds, limits["budget"][0]: [budgeted] * self.seeds}
        for what, how in (limits[name] for name in self.controls):
            for control in CONTROLS:
                by_surgery[f"{control} {what}"] = [choice(select=control, seed=seed, **how) for seed in seeds]
        variants = [(Variant(SINGLE_TASK), [0.0] * self.seeds), (Variant("joint"), [0.0] * self.seeds)]
        for surgery, of_seed in by_surgery.items():
            plans = tuple(one.plan for one in of_seed)
            variants.append((Variant("joint", surgery, plans), [one.covered for one in of_seed]))
        return [Job(self.settings, variant, seed, covered[seed]) for seed in seeds for variant, covered in variants]

    @property
    def variants(self) -> list[Variant]:
        """What is compared."""
        return [job.variant for job in self.jobs if job.seed == 0]

    def time_steps(self, rounds: int) -> dict[str, float]:
        """Seconds of a joint training step of each variant's first plan, in turn."""
        titles = {variant.label: title(variant) for variant in self.variants if not variant.is_single_task}
        timed = [variant for variant in self.variants if not variant.is_single_task]
        return {titles[label]: s for label, s in time_steps(self.problem, timed, CPU, rounds).items()}

    def table(self, entry: Mapping[str, Any]) -> str:
        """Means and spreads of what was measured so far."""
        runs: dict[str, list[Any]] = {title(variant): [] for variant in self.variants}
        for job in self.jobs:
            runs[title(job.variant)] += [entry["runs"][job.name]] if job.name in entry["runs"] else []
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


def train(job: Job) -> dict[str, Any]:
    """Train, evaluate and count one variant."""
    problem, variant = job.settings.problem(), job.variant
    inputs = example_inputs(problem, job.seed)
    model = variant.model(problem, job.seed, CPU)
    if variant.is_single_task:
        costs = run_costs.single_task_costs(model, problem.task_names, inputs)
        results: dict[str, Any] = {}
        for task in problem.task_names:
            results |= fit(job, variant.model(problem, job.seed, CPU), [task])
    else:
        costs = run_costs.costs_per_sample(model, inputs)
        results = fit(job, model, problem.task_names)
    layers = list(variant.plans[job.seed].layers) if variant.plans else []
    return {"seed": job.seed, "results": results, "layers": layers, "covered": job.covered, **asdict(costs)}


def fit(job: Job, model: nn.Module, tasks: Sequence[str]) -> dict[str, Any]:
    """Train a model on some tasks, and evaluate it."""
    problem, settings = job.settings.problem(), job.settings
    loader, test = make_loaders(problem, job.seed)
    torch.manual_seed(job.seed)
    recon.train(
        model,
        loader,
        problem.losses_of(tasks),
        optimizer=make_optimizer(problem, model, settings.recipe),
        scheduler=make_scheduler(problem, loader, settings.epochs),
        epochs=settings.epochs,
    )
    return recon.evaluate(model, test, [task for task in problem.tasks if task.name in tasks])


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
        settings = replace(STUDIES[name], **{option: value for option, value in given.items() if value is not None})
        entry = ledger.of(settings)
        bench = Bench(settings, args.seeds, args.budget, args.controls, args.out)
        missing = [job for job in bench.jobs if job.name not in entry["runs"]]
        now = missing[:left]
        left = None if left is None else left - len(now)
        for number, (job, run) in enumerate(in_turn_or_parallel(train, now, args.workers), start=1):
            entry["runs"][job.name] = run
            ledger.save()
            print(f"{name}: {number} of {len(now)}: {job.name}", file=sys.stderr)
        timed = {title(variant) for variant in bench.variants if not variant.is_single_task}
        if len(now) == len(missing) and timed - entry["seconds_per_step"].keys():
            entry["seconds_per_step"] = bench.time_steps(args.rounds)
            ledger.save()
        print(
            f"{name}: {settings.steps} each, mean ± standard deviation over seeds\n{bench.table(entry)}\n", flush=True
        )


if __name__ == "__main__":
    main()
