"""What `recon demo` does: one profile, then every way to train, plain and branched, side by side. Imports torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import recon
from recon import problems
from recon.evaluation import directions
from recon.files import write_text
from recon.pictures import before_after, heatmap
from recon.problem import Problem
from recon.runs import SINGLE_TASK, Run, json_values
from recon.timing import step_seconds
from recon.trainer import task_losses
from recon_cli import workbench
from recon_cli.demo_story import Outcome, Results, Story
from recon_cli.optimizers import make_optimizer, make_scheduler
from recon_cli.parsing import Report
from recon_cli.recipe import Recipe

PROBLEM = "digits"
_PROFILE_EPOCHS = 3


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, on the plain model or on a branched one.

    Args:
        method: a gradient method, or `SINGLE_TASK`.
        surgery: how its layers were chosen; empty for the plain model.
        plans: of each seed; empty for the plain model.
        counted: whether conflicts are counted while it trains.
    """

    method: str
    surgery: str = ""
    plans: tuple[recon.BranchPlan, ...] = ()
    counted: bool = False

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.method} + {self.surgery}" if self.surgery else self.method


@dataclass(frozen=True)
class Demo:
    """The demo on the problem `digits`.

    Args:
        folder: where the map, the branched model, the results and the pictures go.
        seeds: how often everything is trained.
        epochs: of every training.
        top_k: how many layers are branched.
        device: where the models run.
        workers: how many trainings run at the same time.
    """

    folder: Path
    seeds: int
    epochs: int
    top_k: int
    device: torch.device
    workers: int

    @property
    def surgery(self) -> str:
        """What the tables call Recon's plan."""
        return f"Recon K={self.top_k}"

    def run(self) -> Report:
        """Profile, train, time, print."""
        with _one_thread():
            start = time.perf_counter()
            cmap = self._profile()
            variants = self._variants(cmap)
            plan = next(variant.plans[0] for variant in variants if variant.surgery == self.surgery)
            heatmap(cmap, self.folder / "conflicts_by_layer.png", branched=list(plan.layers))
            outcomes = self._train_all(variants)
            runs = self._runs(variants, outcomes)
            before, after = (_mean([o.conflicts for o in outcomes[k]]) for k in ("joint", f"joint + {self.surgery}"))
            before_after(before, after, self.folder / "conflicts_before_after.png")
            minutes = (time.perf_counter() - start) / 60
            story = Story(self.seeds, self.epochs, self.surgery, cmap, plan, runs, outcomes, before, after, minutes)
        write_text(self.folder / "results.json", json.dumps(json_values(story.data()), indent=1) + "\n")
        return Report(story.text(self.folder), story.data())

    def _profile(self) -> recon.ConflictMap:
        _say(f"Profiling {PROBLEM}: {_PROFILE_EPOCHS} epochs of joint training")
        problem = problems.get(PROBLEM)
        model = workbench.make_model(problem, 0).to(self.device)
        train, _ = workbench.make_loaders(problem, 0, self.device)
        cmap = recon.profile(
            model,
            train,
            problem.losses,
            optimizer=make_optimizer(problem, model, Recipe()),
            epochs=_PROFILE_EPOCHS,
            made_by={"problem": PROBLEM, "backbone": type(model).__name__, "seed": 0},
        )
        cmap.save(self.folder / "map.json")
        return cmap

    def _variants(self, cmap: recon.ConflictMap) -> list[Variant]:
        model = workbench.make_model(problems.get(PROBLEM), 0)
        plan = recon.plan(cmap, model, top_k=self.top_k)
        seeds = range(self.seeds)
        chosen = tuple(plan for _ in seeds)
        random = tuple(recon.plan(cmap, model, top_k=self.top_k, select="random", seed=seed) for seed in seeds)
        control = f"random K={self.top_k}"
        return [
            Variant(SINGLE_TASK),
            Variant("joint", counted=True),
            Variant("pcgrad"),
            Variant("joint", self.surgery, chosen, counted=True),
            Variant("pcgrad", self.surgery, chosen),
            Variant("joint", control, random),
        ]

    def _train_all(self, variants: Sequence[Variant]) -> dict[str, list[Outcome]]:
        """Every variant's outcomes, by seed. The trainings are independent, so the workers change nothing but time."""
        jobs = [(variant, seed) for seed in range(self.seeds) for variant in variants]
        done: dict[tuple[str, int], Outcome] = {}
        for number, (variant, seed, outcome) in enumerate(self._outcomes(jobs), start=1):
            done[variant.label, seed] = outcome
            _say(f"Trained {number} of {len(jobs)}: {variant.label}, seed {seed}")
        return {variant.label: [done[variant.label, seed] for seed in range(self.seeds)] for variant in variants}

    def _outcomes(self, jobs: Sequence[tuple[Variant, int]]) -> Iterator[tuple[Variant, int, Outcome]]:
        if self.workers == 1:
            yield from ((variant, seed, self.train(variant, seed)) for variant, seed in jobs)
            return
        with ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            futures = {pool.submit(self.train, variant, seed): (variant, seed) for variant, seed in jobs}
            try:
                yield from ((*futures[future], future.result()) for future in as_completed(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def train(self, variant: Variant, seed: int) -> Outcome:
        """Train and evaluate one variant."""
        problem = problems.get(PROBLEM)
        if variant.method == SINGLE_TASK:
            models = {task: workbench.make_model(problem, seed).to(self.device) for task in problem.task_names}
            return Outcome(
                {k: v for task in models for k, v in self._fit(problem, models[task], "joint", seed, [task]).items()},
                {},
            )
        model = self._model(problem, variant, seed)
        profiler = recon.Profiler(model) if variant.counted else None
        results = self._fit(problem, model, variant.method, seed, problem.task_names, profiler)
        if variant.label == f"pcgrad + {self.surgery}" and seed == 0:
            recon.save(model, self.folder / "branched")
        return Outcome(results, profiler.conflict_map().shares(0.0) if profiler else {})

    def _fit(
        self,
        problem: Problem,
        model: nn.Module,
        method: str,
        seed: int,
        tasks: Sequence[str],
        profiler: recon.Profiler | None = None,
    ) -> Results:
        train, test = workbench.make_loaders(problem, seed, self.device)
        torch.manual_seed(seed)
        optimizer = make_optimizer(problem, model, Recipe())
        losses = {task: loss for task, loss in problem.losses.items() if task in tasks}
        recon.train(
            model,
            train,
            losses,
            optimizer=optimizer,
            scheduler=make_scheduler(problem, train, self.epochs),
            method=method,
            epochs=self.epochs,
            profiler=profiler,
        )
        return recon.evaluate(model, test, [task for task in problem.tasks if task.name in tasks])

    def _model(self, problem: Problem, variant: Variant, seed: int) -> nn.Module:
        model = workbench.make_model(problem, seed).to(self.device)
        if not variant.plans:
            return model
        return recon.convert(model, variant.plans[seed], workbench.few_samples(self._batch(problem)[0])[0])

    def _batch(self, problem: Problem) -> tuple[Any, Mapping[str, Any]]:
        train, _ = workbench.make_loaders(problem, 0)
        return workbench.first_batch(problem, train, self.device)

    def _runs(self, variants: Sequence[Variant], outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Run]:
        """Each variant's mean results and its costs."""
        _say("Timing the training steps of all, in turn")
        problem = problems.get(PROBLEM)
        batch = self._batch(problem)
        seconds = step_seconds({variant.label: self._step(problem, variant, batch) for variant in variants})
        return {
            variant.label: self._run_of(problem, variant, outcomes[variant.label], seconds[variant.label], batch[0])
            for variant in variants
        }

    def _run_of(
        self, problem: Problem, variant: Variant, outcomes: Sequence[Outcome], seconds: float, inputs: Any
    ) -> Run:
        model = self._model(problem, variant, 0)
        if variant.method == SINGLE_TASK:
            costs = workbench.single_task_costs(model, problem.task_names, inputs)
        else:
            costs = workbench.costs_per_sample(model, inputs)
        tables = [outcome.results for outcome in outcomes]
        return Run(
            problem=PROBLEM,
            label=variant.label,
            tasks=problem.task_names,
            method=variant.method,
            surgery=variant.surgery,
            branched_layers=tuple(variant.plans[0].layers) if variant.plans else (),
            epochs=self.epochs,
            parameters=costs.parameters,
            macs=costs.macs,
            seconds_per_step=seconds,
            results={task: _mean([table[task] for table in tables]) for task in problem.task_names},
            higher_is_better=directions(problem.tasks),
            finished=True,
        )

    def _step(self, problem: Problem, variant: Variant, batch: tuple[Any, Mapping[str, Any]]) -> Callable[[], None]:
        """One training step of a fresh model; for single-task training, one of each model."""
        if variant.method != SINGLE_TASK:
            return self._step_of(problem, variant, variant.method, batch, problem.task_names)
        alone = [self._step_of(problem, variant, "joint", batch, [task]) for task in problem.task_names]

        def one_of_each() -> None:
            for step in alone:
                step()

        return one_of_each

    def _step_of(
        self,
        problem: Problem,
        variant: Variant,
        method: str,
        batch: tuple[Any, Mapping[str, Any]],
        tasks: Sequence[str],
    ) -> Callable[[], None]:
        model = self._model(problem, variant, 0)
        optimizer = make_optimizer(problem, model, Recipe())
        losses = {task: loss for task, loss in problem.losses.items() if task in tasks}
        chosen = recon.methods.get(method)

        def step() -> None:
            optimizer.zero_grad()
            recon.backward(task_losses(model, batch[0], batch[1], losses), model, chosen)
            optimizer.step()

        return step


def default_workers(device: torch.device) -> int:
    """One training a core, four at the most; one alone on a GPU."""
    return 1 if device.type == "cuda" else min(4, os.cpu_count() or 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A second thread saves a network this small a fifth of its time; where the other core is busy, waiting for it
    # costs many times that.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mean(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of several tables with the same keys."""
    return {key: fmean(table[key] for table in tables) for key in tables[0]}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
