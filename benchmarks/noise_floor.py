"""What the noise floor is worth: rankings by count, rate and excess between seeds, and plans by each at equal K.

    python benchmarks/noise_floor.py --out floor.json --data-root DATA            # three problems, two seeds
    python benchmarks/noise_floor.py --out floor.json --problems digits --quick   # a minute, to see that it works
    python benchmarks/noise_floor.py --out floor.json --data-root DATA --runs 5   # five more, then the table so far

Per problem and seed, one profile with a floor in every second step ranks the layers in each way. Then the network of
the same seed is trained anew with the top K branched, K a quarter of the shared layers, beside K random layers, the
first K and joint training; rankings that choose the same layers share a training. DATA holds the folders MNIST,
FashionMNIST and nyuv2. Everything is kept in the file as soon as it is done, and is not done again. All of it takes
about twenty minutes of two free CPU cores; the networks and data sets are small for that (`STUDIES`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from scipy.stats import spearmanr
from torch import nn

import recon
from recon import BranchPlan, ConflictMap, Problem, problems
from recon.experiments.bench.variants import in_turn_or_parallel
from recon.experiments.comparison_rows import spread
from recon.experiments.inputs import example_inputs, make_loaders, make_model, seed_everything, threshold_of
from recon.maps.measures import By
from recon.models import SegNet, SmallResNet
from recon.problems.loading import TensorBatches, in_order, shuffled
from recon.support.files.whole import write_text
from recon.support.tables import text_table
from recon.training.evaluation import directions

RANKINGS: tuple[By, ...] = get_args(By)
JOINT = "joint"
FLOOR = 2  # a floor in every second step: the study is of what it says, not of its price


@dataclass(frozen=True)
class Study:
    """A problem, and how its networks are trained here: by Adam, one cycle of the learning rate.

    Args:
        name: of the problem.
        train_samples: of its training data; all if None.
        test_samples: of its test data, the first ones; all if None.
        batch: samples in a batch.
        lr: the largest learning rate; a profile has it throughout.
        profile_epochs: of the profile.
        epochs: of every training.
    """

    name: str
    train_samples: int | None
    test_samples: int | None
    batch: int
    lr: float
    profile_epochs: int
    epochs: int

    def problem(self, data_root: Path | None) -> Problem:
        """The problem, with a network that a CPU can train."""
        where = {"data_root": data_root} if self.name in DATA else {}
        problem = problems.get(self.name, train_samples=self.train_samples, **where)
        original = problem.make_loaders

        def loaders(seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
            train, test = (loader.dataset for loader in original(seed))  # type: ignore[attr-defined]
            return shuffled(train, self.batch, seed), in_order(first(test, self.test_samples), 4 * self.batch)

        return replace(problem, make_loaders=loaders, make_model=NETWORKS.get(self.name, problem.make_model))


def first(data: TensorBatches, count: int | None) -> TensorBatches:
    """The first samples of a data set."""
    targets = {task: target[:count] for task, target in data.targets.items()}
    return TensorBatches(data.inputs[:count], targets, data.transform, data.target_transform)


DATA = {"multi-fashion-mnist": "", "nyuv2": "nyuv2"}  # the folder of the data's root
NETWORKS: dict[str, Callable[[], nn.Module]] = {  # of digits, the problem's own: a SmallResNet
    "multi-fashion-mnist": lambda: SmallResNet({"digit": 10, "fashion": 10}),
    "nyuv2": lambda: SegNet({"segmentation": 13, "depth": 1, "normals": 3}, width=8),
}
STUDIES = {
    "digits": Study("digits", None, None, 128, 3e-3, profile_epochs=4, epochs=6),
    "multi-fashion-mnist": Study("multi-fashion-mnist", 6144, 4000, 128, 3e-3, profile_epochs=3, epochs=4),
    "nyuv2": Study("nyuv2", 240, 160, 8, 1e-3, profile_epochs=4, epochs=6),
}
QUICK: dict[str, Any] = {"train_samples": 256, "test_samples": 64, "profile_epochs": 1, "epochs": 1}


@dataclass(frozen=True)
class Job:
    """A profile, or a training with some layers branched; it can be pickled."""

    study: Study
    data_root: Path | None
    seed: int
    layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The training's name in the file: the same for the same layers."""
        return f"seed {self.seed}: {' '.join(sorted(self.layers)) or JOINT}"


def profile(job: Job) -> ConflictMap:
    """The conflict map of a seed, with its noise floor."""
    problem = job.study.problem(job.data_root)
    model, (loader, _) = make_model(problem, job.seed), make_loaders(problem, job.seed)
    return recon.profile(
        model,
        loader,
        problem.losses,
        optimizer=torch.optim.Adam(model.parameters(), job.study.lr),
        epochs=job.study.profile_epochs,
        threshold=threshold_of(problem, None),
        floor=FLOOR,
    )


def train(job: Job) -> dict[str, Any]:
    """Train and evaluate one network."""
    problem, study = job.study.problem(job.data_root), job.study
    model, (loader, test) = make_model(problem, job.seed), make_loaders(problem, job.seed)
    if job.layers:
        plan = BranchPlan.per_task(list(job.layers), problem.task_names)
        model = recon.convert(model, plan, example_inputs(problem, job.seed))
    seed_everything(job.seed)
    steps = study.epochs * len(loader)  # type: ignore[arg-type]
    recon.train(
        model,
        loader,
        problem.losses,
        optimizer=torch.optim.Adam(model.parameters(), study.lr),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, study.lr, total_steps=steps),
        epochs=study.epochs,
    )
    return recon.evaluate(model, test, problem.tasks)


class Bench:
    """One problem: its maps, its trainings, its tables; the entry is its part of the file."""

    def __init__(self, study: Study, data_root: Path | None, seeds: int, out: Path, entry: dict[str, Any]) -> None:
        self.study, self.seeds, self.out, self.entry = study, range(seeds), out, entry
        self.data_root = None if data_root is None else data_root / DATA.get(study.name, "")
        self.problem = study.problem(self.data_root)

    def map_path(self, seed: int) -> Path:
        """Where a seed's conflict map is kept."""
        return self.out.with_suffix(f".{self.study.name}.{seed}.map.json")

    def profiles(self) -> list[Job]:
        """The profiles that are missing."""
        return [self._job(seed) for seed in self.seeds if not self.map_path(seed).exists()]

    def maps(self) -> dict[int, ConflictMap]:
        """What is there, by seed."""
        return {seed: ConflictMap.load(path) for seed in self.seeds if (path := self.map_path(seed)).exists()}

    def plans(self, seed: int, cmap: ConflictMap) -> dict[str, Job]:
        """What is trained, by what the table calls it."""
        names, k = [layer.name for layer in cmap.layers], quarter(cmap)
        model = make_model(self.problem, seed)
        chosen: dict[str, Sequence[str]] = {
            f"by {by}": list(recon.plan(cmap, model, top_k=k, by=by).layers) for by in RANKINGS
        }
        chosen |= {"random": random.Random(seed).sample(names, k), "first": names[:k], JOINT: ()}
        return {label: self._job(seed, tuple(layers)) for label, layers in chosen.items()}

    def missing(self) -> list[Job]:
        """The trainings that are not done yet, each once, seed by seed."""
        jobs = {job.name: job for seed, cmap in self.maps().items() for job in self.plans(seed, cmap).values()}
        return [job for name, job in jobs.items() if name not in self.entry["runs"]]

    def agreement(self) -> str:
        """How the rankings agree between seeds, and with the tasks' own noise."""
        maps = list(self.maps().values())
        pairs = list(combinations(maps, 2))
        rows = []
        for label, scores in SCORES.items():
            by_map = {id(cmap): scores(cmap) for cmap in maps}
            between = [correlation(by_map[id(one)], by_map[id(other)]) for one, other in pairs]
            overlap = [jaccard(by_map[id(one)], by_map[id(other)], quarter(one)) for one, other in pairs]
            with_noise = [correlation(by_map[id(cmap)], own_noise(cmap)) for cmap in maps]
            rows.append([label, mean(between), mean(overlap), mean(with_noise) if scores is not own_noise else "-"])
        header = ["ranking", "Spearman between seeds", "top-K Jaccard", "Spearman with own noise"]
        return text_table(header, rows)

    def levels(self) -> str:
        """How often tasks conflict, and how often they would by noise alone: means over layers and seeds."""
        maps = list(self.maps().values())
        between = fmean(fmean(cmap.scores(by="rate").values()) for cmap in maps)
        own = {task: fmean(fmean(f[task] for f in cmap.floor().values()) for cmap in maps) for task in maps[0].tasks}
        noise = ", ".join(f"{task} {100 * share:.0f} %" for task, share in own.items())
        steps = f"{maps[0].steps} steps, {len(maps[0].layers)} layers, S = {maps[0].threshold:g}"
        return (
            f"{steps}. Tasks conflict with each other in {100 * between:.0f} % of the steps; with themselves: {noise}."
        )

    def worth(self) -> str:
        """Δm of each plan against joint training of the same seed."""
        runs, better = self.entry["runs"], directions(self.problem.tasks)
        found: dict[str, list[float]] = {}
        same: dict[str, set[str]] = {}
        for seed, cmap in self.maps().items():
            plans = self.plans(seed, cmap)
            for label, job in plans.items():
                values = found.setdefault(label, [])
                if {job.name, plans[JOINT].name} <= runs.keys():
                    values.append(recon.delta_m(runs[job.name], runs[plans[JOINT].name], better))
                others = {other for other, plan in plans.items() if plan.name == job.name}
                same[label] = same.get(label, others) & others
        rows = []
        for label, values in found.items():
            twin = next((other for other in found if other in same[label]), label)
            note = "" if twin == label else f"the layers {twin}"
            by_seed = " ".join(f"{value:+.2f}" for value in values)
            rows.append([label, str(len(values)), spread(values, 2, sign=True), by_seed, note])
        return text_table(["plan", "seeds", "Δm % to joint", "by seed", ""], rows)

    def _job(self, seed: int, layers: tuple[str, ...] = ()) -> Job:
        return Job(self.study, self.data_root, seed, layers)


def quarter(cmap: ConflictMap) -> int:
    """K."""
    return max(1, len(cmap.layers) // 4)


def own_noise(cmap: ConflictMap) -> dict[str, float]:
    """How often the tasks conflict with themselves, by layer: the mean over tasks."""
    return {layer: fmean(shares.values()) for layer, shares in cmap.floor().items()}


SCORES: dict[str, Callable[[ConflictMap], Mapping[str, float]]] = {
    **{f"by {by}": partial(ConflictMap.scores, by=by) for by in RANKINGS},
    "own noise": own_noise,
}


def correlation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Spearman's, over the layers that both have; NaN where one of them has no differences."""
    layers = [layer for layer in one if layer in other]
    values = [[scores[layer] for layer in layers] for scores in (one, other)]
    return float(spearmanr(*values).statistic) if all(len(set(v)) > 1 for v in values) else float("nan")


def jaccard(one: Mapping[str, float], other: Mapping[str, float], k: int) -> float:
    """The overlap of the top K."""
    tops = [set(sorted(scores, key=lambda name: -scores[name])[:k]) for scores in (one, other)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def mean(values: Sequence[float]) -> str:
    """As the table shows it."""
    return f"{fmean(values):.2f}" if values else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(STUDIES), choices=STUDIES, metavar="NAME")
    parser.add_argument("--data-root", type=Path, help="where MNIST, FashionMNIST and nyuv2 are")
    parser.add_argument("--out", type=Path, required=True, help="the file that keeps the results; maps go beside it")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=int, help="run at most so many trainings now")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="one epoch on a few samples: the figures mean nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}

    def save() -> None:
        write_text(args.out, json.dumps(data, indent=1) + "\n")

    left = args.runs
    for name in args.problems:
        if name in DATA and args.data_root is None:
            print(f"{name}: left out, for it needs --data-root\n")
            continue
        study = replace(STUDIES[name], **QUICK) if args.quick else STUDIES[name]
        entry = data.setdefault(name, {"settings": asdict(study), "runs": {}})
        if entry["settings"] != asdict(study):
            sys.exit(f"{args.out} was measured with {entry['settings']}, not {asdict(study)}. Choose another --out.")
        bench = Bench(study, args.data_root, args.seeds, args.out, entry)
        for job, cmap in in_turn_or_parallel(profile, bench.profiles(), args.workers):
            cmap.save(bench.map_path(job.seed))
        missing = bench.missing()
        now = missing[:left]
        left = None if left is None else left - len(now)
        for number, (job, results) in enumerate(in_turn_or_parallel(train, now, args.workers), start=1):
            entry["runs"][job.name] = results
            save()
            print(f"{name}: {number} of {len(now)}: {job.name}", file=sys.stderr, flush=True)
        partial = "" if len(now) == len(missing) else f" (PARTIAL: {len(missing) - len(now)} trainings are missing)"
        print(f"{name}{partial}: {bench.levels()}\n\n{bench.agreement()}\n\n{bench.worth()}\n", flush=True)


if __name__ == "__main__":
    main()
