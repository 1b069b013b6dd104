"""Training: any method on a plain or a branched model, or one model for each task. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recon import branching, training
from recon.branching.plan import find_plan
from recon.experiments import costs as run_costs
from recon.experiments import saved_models
from recon.experiments.inputs import few_samples, first_batch, make_loaders, make_model, seed_everything
from recon.experiments.optimizers import depends_on_length, make_optimizer, make_scheduler
from recon.experiments.recipe import Recipe
from recon.experiments.run import RUN_FILE, SINGLE_TASK, Run
from recon.experiments.training.evaluations import Evaluations
from recon.experiments.training.run_folder import BEST, CHECKPOINT_FILE, METRICS_FILE, RUN_MARKS, RunFolder
from recon.experiments.training.tensorboard import Events
from recon.methods import parse
from recon.problems.problem import Problem, Task
from recon.profiling.conflict_counter import ConflictCounter, Counting
from recon.profiling.preflight import refuse_lonely
from recon.support import launch
from recon.training import RankBatches
from recon.training.evaluation import directions

EVENTS = "tensorboard"


def silent(text: str) -> None:
    """Ignores a line of text that nobody reads."""


@dataclass(frozen=True)
class Training:
    """One training, and where its run goes.

    Args:
        problem: the problem.
        folder: where the run goes.
        epochs: passes over the train loader.
        seed: of fresh models and the loaders.
        recipe: how it is trained.
        device: where the model runs.
        method: the gradient method, or `SINGLE_TASK`.
        source: a folder with the model to start from; a fresh one if None.
        train_samples: how many training samples the problem was limited to, if it was.
        evaluations: when, and what is best.
        tensorboard: whether TensorBoard's events are written.
        resume: go on from the checkpoints.
        home: the file or module that the problem comes from.
        plan: branches a fresh model; None leaves it unbranched.
        surgery: how the plan's layers were chosen.
        counting: how conflicts are counted while one model learns all tasks; they are not if None.
        tell: called with a line of text after every epoch.
        progress: whether a bar on stderr shows how far an epoch is.
    """

    problem: Problem
    folder: Path
    epochs: int
    seed: int
    recipe: Recipe
    device: torch.device
    method: str = "joint"
    source: Path | None = None
    train_samples: int | None = None
    evaluations: Evaluations = field(default_factory=Evaluations)
    tensorboard: bool = False
    resume: bool = False
    home: str = ""
    plan: branching.BranchPlan | None = None
    surgery: str = ""
    counting: Counting | None = None
    tell: Callable[[str], None] = silent
    progress: bool = False

    @property
    def folders(self) -> dict[str, Path]:
        """Where the models go, by what is trained."""
        if self.method != SINGLE_TASK:
            return {self.method: self.folder}
        return {task: saved_models.task_folder(self.folder, task) for task in self.problem.task_names}

    @property
    def checkpoints(self) -> list[Path]:
        """What the training can go on from."""
        return [folder / CHECKPOINT_FILE for folder in self.folders.values()]

    def settings(self) -> dict[str, Any]:
        """What must be the same at a resume, by option."""
        return {
            "PROBLEM": self.home,
            "--method": self.method,
            "--model": (self.problem.backbone or None) if self.source is None else str(self.source),
            "--train-samples": self.train_samples,
            "--seed": self.seed,
            **({} if self.plan is None else {"branched layers": list(self.plan.layers)}),
            "--evaluate-every": self.evaluations.every,
            "--best-by": self.evaluations.best_by,
            **self.recipe.settings(),
        }

    def run(self) -> Run:
        """Train, evaluate, save."""
        return self._single_tasks() if self.method == SINGLE_TASK else self._together()

    def left(self) -> str:
        """Says which model an interrupted training left behind; empty if none."""
        record = Run.load(self.folder) if (self.folder / RUN_FILE).exists() else None
        if record is None or record.finished or not record.history:
            return ""
        last = record.history[-1]
        folder = next((self.folders[task] for task in last["losses"] if task in self.folders), self.folder)
        return f"{folder} holds the model after epoch {last['number']} of {self.epochs}. "

    def _together(self) -> Run:
        """One model for all tasks."""
        model, origin = self._start()
        plan = find_plan(model)
        layers = tuple(plan.layers) if plan else ()
        surgery = origin.surgery if origin else self.surgery or (f"K={len(layers)}" if layers else "")
        run = self._new_run(f"{self.method} + {surgery}" if surgery else self.method)
        run.surgery, run.branched_layers = surgery, layers
        run.backbone = self.problem.backbone or (origin.backbone if origin else "")
        costs = run_costs.costs_per_sample(model, self._example_inputs())
        run.parameters, run.macs = costs.parameters, costs.macs
        run.results = self._fit(run, model, self.problem.tasks, self.folder)
        self._finish(run)
        best = self.evaluations.best(run.history, run.higher_is_better)
        if best is not None and self.evaluations.keep_best and launch.number() == 0:
            replace(run, results=best["results"]).save(self.folder / BEST)
        return run

    def _single_tasks(self) -> Run:
        """One fresh model for each task."""
        run = self._new_run(SINGLE_TASK)
        run.backbone = self.problem.backbone
        model, _ = self._start()
        costs = run_costs.single_task_costs(model, run.tasks, self._example_inputs())
        run.parameters, run.macs = costs.parameters, costs.macs
        if launch.number() == 0 and not any((self.folder / mark).exists() for mark in RUN_MARKS):
            run.save(self.folder)  # the folder must be known as a run's before a task's folder lies in it
        results: dict[str, Mapping[str, float]] = {}
        for task in self.problem.tasks:
            model, _ = self._start()
            results |= self._fit(run, model, [task], self.folders[task.name])
        run.results = results
        return self._finish(run)

    def _start(self) -> tuple[nn.Module, Run | None]:
        if self.source is None:
            model = make_model(self.problem, self.seed).to(self.device)
            if self.plan is not None:
                model = branching.convert(model, self.plan, few_samples(self._example_inputs())[0])
            return model, None
        model, origin = saved_models.load_model(self.problem, self.source, self.seed)
        return model.to(self.device), origin

    def _example_inputs(self) -> object:
        train, _ = make_loaders(self.problem, self.seed)
        return first_batch(self.problem, train, self.device)[0].inputs

    def _new_run(self, label: str) -> Run:
        """A record; a resumed training's has the epochs that were done."""
        done: list[dict[str, Any]] = []
        if self.resume and any(checkpoint.exists() for checkpoint in self.checkpoints):
            earlier = saved_models.read_record(self.problem, self.folder)
            # An older run's, which this one has not replaced yet, says nothing of it.
            if earlier is not None and not earlier.finished and earlier.settings == self.settings():
                done = earlier.history
        return Run(
            problem=self.problem.name,
            label=label,
            tasks=self.problem.task_names,
            method=self.method,
            seed=self.seed,
            epochs=self.epochs,
            higher_is_better=directions(self.problem.tasks),
            history=done,
            settings=self.settings(),
        )

    def _fit(self, run: Run, model: nn.Module, tasks: Sequence[Task], folder: Path) -> dict[str, dict[str, float]]:
        """Train one model; gives its results after the last epoch."""
        problem = self.problem
        # Fresh loaders and random state: what was looked at before must not shift the order of the batches.
        train, test = make_loaders(problem, self.seed, self.device)
        losses = problem.losses_of(task.name for task in tasks)
        if not run.is_single_task and not parse(self.method).works_alone:
            refuse_lonely(train, losses, self.recipe.accumulate)
        seed_everything(self.seed)
        keeper = RunFolder(folder, run, self.folder, model, tasks, test, self.evaluations, self.tell)
        counter = None
        if self.counting is not None and not run.is_single_task:
            counter = ConflictCounter(model, self.problem.task_names, self.counting)
        several = launch.count() > 1
        fixed = {"--epochs": self.epochs} if depends_on_length(problem, self.recipe) else {}
        history = training.train(
            model,
            RankBatches(train) if several else train,
            losses,
            optimizer=make_optimizer(problem, model, self.recipe),
            scheduler=make_scheduler(problem, train, self.epochs, self.recipe),
            method="joint" if run.is_single_task else self.method,
            epochs=self.epochs,
            clip=self.recipe.clip,
            accumulate=self.recipe.accumulate,
            amp=self.recipe.amp,
            profiler=counter,
            recorder=training.Recorder(folder / METRICS_FILE, [Events(folder / EVENTS)] if self.tensorboard else []),
            on_epoch=keeper.end_epoch,
            progress=self.progress,
            checkpoint=None if several else folder / CHECKPOINT_FILE,
            resume=self.resume,
            settings={"problem": problem.name, **self.settings(), **fixed, "device": self.device.type},
        )
        keeper.finish(history)
        if counter is not None and launch.number() == 0:
            counter.save(folder, {"problem": self.problem.name, "method": self.method, "seed": self.seed})
        run.seconds_per_step += history.seconds / max(1, history.steps)
        return history.epochs[-1].results

    def _finish(self, run: Run) -> Run:
        run.finished = True
        if launch.number() == 0:
            run.save(self.folder)
        return run
