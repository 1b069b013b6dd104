"""Whether `adult` and `tox21` train to better than a linear baseline on the same inputs.

    python benchmarks/linear_baselines.py --data-root DATA                 # three seeds: two minutes on one CPU core

The baseline is scikit-learn's logistic regression, one for each task, with the strength of its L2 penalty chosen on a
fifth of the training data, drawn by the seed, and then fitted to all of them. Ours is the problem with its own
settings, as `recon train PROBLEM` takes them: joint training, for a fixed number of epochs. Those settings were chosen
on a part of the training data; the test data are looked at once, in the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import recon
from recon import problems
from recon.experiments.inputs import make_loaders, make_model
from recon.experiments.optimizers import make_optimizer, make_scheduler
from recon.experiments.recipe import Recipe
from recon.problems.problem import Problem
from recon.support.network.forward import Batch

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # scikit-learn's C

Scores = dict[str, dict[str, float]]
Arrays = tuple[np.ndarray, dict[str, np.ndarray]]


def linear(problem: Problem, train: Arrays, test: Arrays, seed: int) -> Scores:
    """A logistic regression for each task."""
    return {task: _linear(*_labelled(train, task), *_labelled(test, task), seed) for task in problem.task_names}


def _linear(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, seed: int) -> dict[str, float]:
    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    aucs = {c: roc_auc_score(held_y, _fit(fit_x, fit_y, c).decision_function(held_x)) for c in STRENGTHS}
    model = _fit(x, y, max(aucs, key=lambda c: aucs[c]))
    return {
        "auc": float(roc_auc_score(test_y, model.decision_function(test_x))),
        "accuracy": float(model.score(test_x, test_y)),
    }


def _fit(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=2000).fit(csr_matrix(x), y)


def _labelled(arrays: Arrays, task: str) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = arrays
    labelled = ~np.isnan(targets[task])
    return inputs[labelled], targets[task][labelled]


def ours(problem: Problem, seed: int) -> Scores:
    """The problem's own network, trained as it says."""
    model = make_model(problem, seed)
    train, test = make_loaders(problem, seed)
    recon.train(
        model,
        train,
        problem.losses,
        optimizer=make_optimizer(problem, model, Recipe()),
        scheduler=make_scheduler(problem, train, problem.epochs),
        epochs=problem.epochs,
    )
    return recon.evaluate(model, test, problem.tasks)


def arrays(loader: Iterable[Batch], tasks: Iterable[str]) -> Arrays:
    """What a loader gives, in its order."""
    batches = list(loader)
    inputs = torch.cat([inputs for inputs, _ in batches])
    targets = {
        task: torch.cat([targets.get(task, torch.full((len(x),), torch.nan)) for x, targets in batches])
        for task in tasks
    }
    return inputs.numpy(), {task: target.numpy() for task, target in targets.items()}


def report(problem: Problem, seeds: int) -> None:
    """Train and print the table of one problem."""
    train, test = (arrays(loader, problem.task_names) for loader in whole(problem))
    runs: dict[str, list[Scores]] = {"linear": [], "ours": []}
    seconds = []
    for seed in range(seeds):
        runs["linear"].append(linear(problem, train, test, seed))
        start = time.perf_counter()
        runs["ours"].append(ours(problem, seed))
        seconds.append(time.perf_counter() - start)
    metrics = [metric.name for metric in problem.tasks[0].metrics]
    print(f"{problem.name}, {seeds} seeds; a training takes {fmean(seconds):.0f} s", flush=True)
    for metric in metrics:
        print(f"{metric:<18}" + "".join(f"{name:>18}" for name in runs))
        for task in problem.task_names:
            cells = [[scores[task][metric] for scores in of_seeds] for of_seeds in runs.values()]
            print(f"{task:<18}" + "".join(f"{_spread(values):>18}" for values in cells))
        means = [[fmean(s[task][metric] for task in s) for s in of_seeds] for of_seeds in runs.values()]
        print(f"{'mean of the tasks':<18}" + "".join(f"{_spread(values):>18}" for values in means))
    print(flush=True)


def whole(problem: Problem) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """The train and the test set, each in order and to the last sample."""
    train, test = problem.make_loaders(0)
    return [train.dataset[list(range(len(train.dataset)))]], test  # type: ignore[attr-defined]


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["adult", "tox21"])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for name in args.problems:
        report(problems.get(name, data_root=args.data_root), args.seeds)


if __name__ == "__main__":
    main()
