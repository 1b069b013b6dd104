"""What `recon demo` does: one profile, then every way to train, plain and branched, side by side. Imports torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from recon import branching, maps, plans, problems, profiling, training
from recon.experiments import inputs as workbench
from recon.experiments.bench.demo_story import Outcome, Results, Story
from recon.experiments.bench.variants import (
    Variant,
    in_turn_or_parallel,
    mean_table,
    one_thread,
    time_steps,
    variant_costs,
)
from recon.experiments.optimizers import make_optimizer, make_scheduler
from recon.experiments.pictures import before_after
from recon.experiments.recipe import Recipe
from recon.experiments.run import SINGLE_TASK, Run
from recon.experiments.training.training import silent
from recon.maps.picture import heatmap
from recon.problems.problem import Problem
from recon.support.files.documents import json_values
from recon.support.files.whole import write_text
from recon.training.evaluation import directions

PROBLEM = "digits"
_PROFILE_EPOCHS = 3


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
        tell: is given a line of text whenever something is done.
    """

    folder: Path
    seeds: int
    epochs: int
    top_k: int
    device: torch.device
    workers: int
    tell: Callable[[str], None] = silent

    @property
    def surgery(self) -> str:
        """What the tables call Recon's plan."""
        return f"Recon K={self.top_k}"

    def run(self) -> Story:
        """Profile, train, time; what was found is in the folder too."""
        with one_thread():
            start = time.perf_counter()
            cmap = self._profile()
            variants = self._variants(cmap)
            plan = next(variant.plans[0] for variant in variants if variant.surgery == self.surgery)
            heatmap(cmap, self.folder / "conflicts_by_layer.png", branched=list(plan.layers))
            outcomes = self._train_all(variants)
            runs = self._runs(variants, outcomes)
            before, after = (
                mean_table([o.conflicts for o in outcomes[k]]) for k in ("joint", f"joint + {self.surgery}")
            )
            before_after(before, after, self.folder / "conflicts_before_after.png")
            minutes = (time.perf_counter() - start) / 60
            story = Story(self.seeds, self.epochs, self.surgery, cmap, plan, runs, outcomes, before, after, minutes)
        write_text(self.folder / "results.json", json.dumps(json_values(story.data()), indent=1) + "\n")
        return story

    def _profile(self) -> maps.ConflictMap:
        self.tell(f"Profiling {PROBLEM}: {_PROFILE_EPOCHS} epochs of joint training")
        problem = problems.get(PROBLEM)
        model = workbench.make_model(problem, 0).to(self.device)
        train, _ = workbench.make_loaders(problem, 0, self.device)
        cmap = profiling.profile(
            model,
            train,
            problem.losses,
            optimizer=make_optimizer(problem, model, Recipe()),
            epochs=_PROFILE_EPOCHS,
            made_by={"problem": PROBLEM, "backbone": type(model).__name__, "seed": 0},
        )
        cmap.save(self.folder / "map.json")
        return cmap

    def _variants(self, cmap: maps.ConflictMap) -> list[Variant]:
        model = workbench.make_model(problems.get(PROBLEM), 0)
        plan = plans.plan(cmap, model, top_k=self.top_k)
        seeds = range(self.seeds)
        chosen = tuple(plan for _ in seeds)
        random = tuple(plans.plan(cmap, model, top_k=self.top_k, select="random", seed=seed) for seed in seeds)
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
        """Every variant's outcomes, by seed."""
        jobs = [(variant, seed) for seed in range(self.seeds) for variant in variants]
        done: dict[tuple[str, int], Outcome] = {}
        for number, (job, outcome) in enumerate(in_turn_or_parallel(self.train, jobs, self.workers), start=1):
            variant, seed = job
            done[variant.label, seed] = outcome
            self.tell(f"Trained {number} of {len(jobs)}: {variant.label}, seed {seed}")
        return {variant.label: [done[variant.label, seed] for seed in range(self.seeds)] for variant in variants}

    def train(self, job: tuple[Variant, int]) -> Outcome:
        """Train and evaluate one variant with one seed."""
        variant, seed = job
        problem = problems.get(PROBLEM)
        if variant.is_single_task:
            models = {task: variant.model(problem, seed, self.device) for task in problem.task_names}
            return Outcome(
                {k: v for task in models for k, v in self._fit(problem, models[task], "joint", seed, [task]).items()},
                {},
            )
        model = variant.model(problem, seed, self.device)
        profiler = profiling.Profiler(model) if variant.counted else None
        results = self._fit(problem, model, variant.method, seed, problem.task_names, profiler)
        if variant.label == f"pcgrad + {self.surgery}" and seed == 0:
            branching.save(model, self.folder / "branched")
        return Outcome(results, profiler.conflict_map().shares(0.0) if profiler else {})

    def _fit(
        self,
        problem: Problem,
        model: nn.Module,
        method: str,
        seed: int,
        tasks: Sequence[str],
        profiler: profiling.Profiler | None = None,
    ) -> Results:
        train, test = workbench.make_loaders(problem, seed, self.device)
        torch.manual_seed(seed)
        optimizer = make_optimizer(problem, model, Recipe())
        losses = {task: loss for task, loss in problem.losses.items() if task in tasks}
        training.train(
            model,
            train,
            losses,
            optimizer=optimizer,
            scheduler=make_scheduler(problem, train, self.epochs),
            method=method,
            epochs=self.epochs,
            profiler=profiler,
        )
        return training.evaluate(model, test, [task for task in problem.tasks if task.name in tasks])

    def _runs(self, variants: Sequence[Variant], outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Run]:
        """Each variant's mean results and its costs."""
        self.tell("Timing the training steps of all, in turn")
        problem = problems.get(PROBLEM)
        seconds = time_steps(problem, variants, self.device)
        return {
            variant.label: self._run_of(problem, variant, outcomes[variant.label], seconds[variant.label])
            for variant in variants
        }

    def _run_of(self, problem: Problem, variant: Variant, outcomes: Sequence[Outcome], seconds: float) -> Run:
        costs = variant_costs(problem, variant, self.device)
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
            results={task: mean_table([table[task] for table in tables]) for task in problem.task_names},
            higher_is_better=directions(problem.tasks),
            finished=True,
        )
