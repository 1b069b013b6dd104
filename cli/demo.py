"""What `recon demo` does: one profile, then every way to train, plain and branched, side by side. Imports torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import recon
from recon import problems
from recon.comparison import compare
from recon.evaluation import directions
from recon.files import write_text
from recon.pictures import before_after, heatmap
from recon.runs import SINGLE_TASK, Run, json_values
from recon.tables import text_table
from recon.timing import step_seconds
from recon.trainer import task_losses
from recon_cli import workbench
from recon_cli.parsing import Report

_PROFILE_EPOCHS = 3

Results = dict[str, dict[str, float]]


@dataclass
class Variant:
    """One way to train: a method, on the plain model or on a branched one.

    Args:
        method: a gradient method, or `SINGLE_TASK`.
        surgery: how its layers were chosen; empty for the plain model.
        plan: `seed -> plan`; None for the plain model.
        results: of each seed.
        conflicts: `{shared layer: share of steps with cos < 0}` of each seed, where they were counted.
    """

    method: str
    surgery: str = ""
    plan: Callable[[int], recon.BranchPlan] | None = None
    results: list[Results] = field(default_factory=list)
    conflicts: list[dict[str, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.method} + {self.surgery}" if self.surgery else self.method


class Demo:
    """The demo on the problem `digits`.

    Args:
        folder: where the map, the branched model, the results and the pictures go.
        seeds: how often everything is trained.
        epochs: of every training.
        top_k: how many layers are branched.
        device: "cpu", "cuda" or None for the best there is.
    """

    def __init__(self, folder: Path, seeds: int, epochs: int, top_k: int, device: str | None) -> None:
        self.folder, self.seeds, self.epochs, self.top_k = folder, seeds, epochs, top_k
        self.device = workbench.choose_device(device)
        self.problem = problems.get("digits")
        self.start = time.perf_counter()

    def run(self) -> Report:
        """Profile, train, time, print."""
        cmap = self._profile()
        plan = recon.plan(cmap, self._fresh(0), top_k=self.top_k)
        heatmap(cmap, self.folder / "conflicts_by_layer.png", branched=list(plan.layers))
        variants = self._variants(cmap, plan)
        for seed in range(self.seeds):
            for variant in variants:
                self._train(variant, seed)
        runs = self._runs(variants)
        before, after = (
            _mean_shares(_find(variants, label).conflicts) for label in ("joint", f"joint + {_recon(self)}")
        )
        before_after(before, after, self.folder / "conflicts_before_after.png")
        return self._report(cmap, plan, variants, runs, before, after)

    def _variants(self, cmap: recon.ConflictMap, plan: recon.BranchPlan) -> list[Variant]:
        def random_plan(seed: int) -> recon.BranchPlan:
            return recon.plan(cmap, self._fresh(seed), top_k=self.top_k, select="random", seed=seed)

        chosen, random = _recon(self), f"random K={self.top_k}"
        return [
            Variant(SINGLE_TASK),
            Variant("joint"),
            Variant("pcgrad"),
            Variant("joint", chosen, lambda seed: plan),
            Variant("pcgrad", chosen, lambda seed: plan),
            Variant("joint", random, random_plan),
            Variant("pcgrad", random, random_plan),
        ]

    def _profile(self) -> recon.ConflictMap:
        self._say(f"Profiling {self.problem.name}: {_PROFILE_EPOCHS} epochs of joint training ...")
        model = self._fresh(0)
        train, _ = workbench.make_loaders(self.problem, 0)
        cmap = recon.profile(
            model,
            train,
            self.problem.losses,
            optimizer=workbench.make_optimizer(self.problem, model, None),
            epochs=_PROFILE_EPOCHS,
            made_by={"problem": self.problem.name, "backbone": type(model).__name__, "seed": 0},
        )
        cmap.save(self.folder / "map.json")
        return cmap

    def _train(self, variant: Variant, seed: int) -> None:
        self._say(f"Training {variant.label}, seed {seed}, {self.epochs} epochs ...")
        if variant.method == SINGLE_TASK:
            results: Results = {}
            for task in self.problem.task_names:
                results |= self._fit(self._fresh(seed), "joint", seed, [task])
            variant.results.append(results)
            return
        model = self._model(variant, seed)
        # Counting conflicts does not change joint training, so these runs serve for both.
        profiler = recon.Profiler(model) if variant.method == "joint" and "random" not in variant.surgery else None
        variant.results.append(self._fit(model, variant.method, seed, self.problem.task_names, profiler))
        if profiler is not None:
            variant.conflicts.append(profiler.conflict_map().shares(0.0))
        if variant.label == f"pcgrad + {_recon(self)}" and seed == 0:
            recon.save(model, self.folder / "branched")

    def _fit(
        self,
        model: nn.Module,
        method: str,
        seed: int,
        tasks: Sequence[str],
        profiler: recon.Profiler | None = None,
    ) -> Results:
        train, test = workbench.make_loaders(self.problem, seed)
        torch.manual_seed(seed)
        optimizer = workbench.make_optimizer(self.problem, model, None)
        losses = {task: loss for task, loss in self.problem.losses.items() if task in tasks}
        recon.train(model, train, losses, optimizer=optimizer, method=method, epochs=self.epochs, profiler=profiler)
        return recon.evaluate(model, test, [task for task in self.problem.tasks if task.name in tasks])

    def _runs(self, variants: Sequence[Variant]) -> dict[str, Run]:
        """Each variant's mean results and its costs."""
        batch = self._batch()
        self._say("Timing training steps of all in turn ...")
        seconds = step_seconds({variant.label: self._step(variant, batch) for variant in variants})
        runs = {}
        for variant in variants:
            if variant.method == SINGLE_TASK:
                costs = workbench.single_task_costs(self._fresh(0), self.problem.task_names, batch[0])
            else:
                costs = workbench.costs_per_sample(self._model(variant, 0), batch[0])
            runs[variant.label] = Run(
                problem=self.problem.name,
                label=variant.label,
                tasks=self.problem.task_names,
                method=variant.method,
                surgery=variant.surgery,
                branched_layers=tuple(variant.plan(0).layers) if variant.plan else (),
                epochs=self.epochs,
                parameters=costs.parameters,
                macs=costs.macs,
                seconds_per_step=seconds[variant.label],
                results=_mean_results(variant.results),
                higher_is_better=directions(self.problem.tasks),
                finished=True,
            )
        return runs

    def _step(self, variant: Variant, batch: tuple[Any, Mapping[str, Any]]) -> Callable[[], None]:
        """One training step of a fresh model; for single-task training, one of each model."""
        if variant.method == SINGLE_TASK:
            alone = [self._plain_step(self._fresh(0), "joint", batch, [task]) for task in self.problem.task_names]
            return lambda: [step() for step in alone].clear()
        return self._plain_step(self._model(variant, 0), variant.method, batch, self.problem.task_names)

    def _plain_step(
        self, model: nn.Module, method: str, batch: tuple[Any, Mapping[str, Any]], tasks: Sequence[str]
    ) -> Callable[[], None]:
        optimizer = workbench.make_optimizer(self.problem, model, None)
        losses = {task: loss for task, loss in self.problem.losses.items() if task in tasks}
        chosen = recon.methods.get(method)

        def step() -> None:
            optimizer.zero_grad()
            recon.backward(task_losses(model, batch[0], batch[1], losses), model, chosen)
            optimizer.step()

        return step

    def _model(self, variant: Variant, seed: int) -> nn.Module:
        model = self._fresh(seed)
        if variant.plan is None:
            return model
        return recon.convert(model, variant.plan(seed), workbench.few_samples(self._batch()[0])[0])

    def _fresh(self, seed: int) -> nn.Module:
        return workbench.make_model(self.problem, seed).to(self.device)

    def _batch(self) -> tuple[Any, Mapping[str, Any]]:
        train, _ = workbench.make_loaders(self.problem, 0)
        return workbench.first_batch(self.problem, train, self.device)

    def _report(
        self,
        cmap: recon.ConflictMap,
        plan: recon.BranchPlan,
        variants: Sequence[Variant],
        runs: dict[str, Run],
        before: dict[str, float],
        after: dict[str, float],
    ) -> Report:
        comparison = compare(runs)
        kept = [name for name in before if name in after]
        rows = [[name, f"{100 * before[name]:.1f}", f"{100 * after[name]:.1f}"] for name in kept]
        means = [fmean(shares[name] for name in kept) for shares in (before, after)] if kept else [0.0, 0.0]
        rows.append(["mean", *(f"{100 * mean:.1f}" for mean in means)])
        minutes = (time.perf_counter() - self.start) / 60
        data = {
            **comparison.as_dict(),
            "seeds": self.seeds,
            "epochs": self.epochs,
            "branched_layers": list(plan.layers),
            "results_by_seed": {variant.label: variant.results for variant in variants},
            "conflicting_steps": {"before": before, "after": {name: after[name] for name in kept}},
            "profiled_steps": cmap.steps,
            "minutes": minutes,
        }
        write_text(self.folder / "results.json", json.dumps(json_values(data), indent=1) + "\n")
        text = [
            f"digits: {self.epochs} epochs each, mean of {self.seeds} seed(s). Accuracies are on the test pairs; Δm is",
            "against one model for each task; ms/step was measured for all in turn.",
            "",
            comparison.text(),
            "",
            f"Recon branched {len(plan.layers)} of {len(cmap.layers)} shared layers: {', '.join(plan.layers)}.",
            "Conflicting steps (cos < 0), in %, in the layers that stay shared, under joint training:",
            "",
            text_table(["layer", "joint", f"joint + {_recon(self)}"], rows),
            "",
            f"{minutes:.1f} minutes. Saved in {self.folder}: map.json, branched/ (pcgrad + {_recon(self)}, seed 0), "
            "results.json,",
            "conflicts_by_layer.png, conflicts_before_after.png.",
        ]
        return Report("\n".join(text), data)

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:4.0f} s] {text}", file=sys.stderr)


def _recon(demo: Demo) -> str:
    return f"Recon K={demo.top_k}"


def _find(variants: Sequence[Variant], label: str) -> Variant:
    return next(variant for variant in variants if variant.label == label)


def _mean_results(results: Sequence[Results]) -> Results:
    first = results[0]
    return {
        task: {name: fmean(result[task][name] for result in results) for name in metrics}
        for task, metrics in first.items()
    }


def _mean_shares(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(share[name] for share in shares) for name in shares[0]}
