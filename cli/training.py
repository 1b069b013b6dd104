"""What `recon train` does once the command line is understood. Imports torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import recon
from recon.checkpoint import PLAN_FILE
from recon.errors import ReconError
from recon.evaluation import directions
from recon.problem import Loss, Problem, Task
from recon.runs import SINGLE_TASK, Run
from recon.surgery import plan_of
from recon.weights import WEIGHTS_FILE
from recon_cli import workbench


class TrainingStoppedError(ReconError):
    """The user stopped the training; the message says what is left of it."""


@dataclass(frozen=True)
class Training:
    """One training command: everything but what is trained.

    Args:
        problem: the problem.
        folder: where the run goes.
        epochs: passes over the train loader.
        seed: of fresh models and the loaders.
        lr: learning rate; the problem's own if None.
        device: where the model runs.
    """

    problem: Problem
    folder: Path
    epochs: int
    seed: int
    lr: float | None
    device: torch.device

    def together(self, method: str, source: Path | None = None) -> Run:
        """Train one model for all tasks: a fresh one, or the one saved in the folder `source`."""
        model, origin = self._start(source)
        layers = tuple(plan_of(model).layers) if hasattr(model, "branch_plan") else ()
        surgery = origin.surgery if origin else f"K={len(layers)}" if layers else ""
        run = self._new_run(method, f"{method} + {surgery}" if surgery else method)
        run.surgery, run.branched_layers = surgery, layers
        costs = workbench.costs_per_sample(model, self._example_inputs())
        run.parameters, run.macs = costs.parameters, costs.macs
        run.results = self._fit(run, model, self.problem.tasks, method, self.folder)
        return self._finish(run)

    def single_tasks(self) -> Run:
        """Train one fresh model for each task."""
        run = self._new_run(SINGLE_TASK, SINGLE_TASK)
        model, _ = self._start(None)
        costs = workbench.single_task_costs(model, run.tasks, self._example_inputs())
        run.parameters, run.macs = costs.parameters, costs.macs
        results: dict[str, Mapping[str, float]] = {}
        for task in self.problem.tasks:
            model, _ = self._start(None)
            folder = workbench.task_folder(self.folder, task.name)
            results |= self._fit(run, model, [task], "joint", folder)
        run.results = results
        for stale in (WEIGHTS_FILE, PLAN_FILE):  # of an older run in this folder, which trained one model
            (self.folder / stale).unlink(missing_ok=True)
        return self._finish(run)

    def _start(self, source: Path | None) -> tuple[nn.Module, Run | None]:
        if source is None:
            return workbench.make_model(self.problem, self.seed).to(self.device), None
        model, origin = workbench.load_model(self.problem, source, self.seed)
        return model.to(self.device), origin

    def _example_inputs(self) -> object:
        train, _ = workbench.make_loaders(self.problem, self.seed)
        return workbench.first_batch(self.problem, train, self.device)[0]

    def _new_run(self, method: str, label: str) -> Run:
        return Run(
            problem=self.problem.name,
            label=label,
            tasks=self.problem.task_names,
            method=method,
            seed=self.seed,
            epochs=self.epochs,
            higher_is_better=directions(self.problem.tasks),
        )

    def _fit(
        self, run: Run, model: nn.Module, tasks: Sequence[Task], method: str, folder: Path
    ) -> dict[str, dict[str, float]]:
        """Train and evaluate one model; its weights and the run's record are saved after every epoch."""
        # Fresh loaders and random state: what was looked at before must not shift the order of the batches.
        train, test = workbench.make_loaders(self.problem, self.seed)
        workbench.seed_everything(self.seed)
        losses: dict[str, Loss] = {task.name: task.loss for task in tasks}
        prefix = f"{tasks[0].name}: " if run.is_single_task else ""
        left = ""

        def save(epoch: recon.Epoch) -> None:
            nonlocal left
            run.history.append(asdict(epoch))
            run.save(self.folder)
            recon.save(model, folder)
            left = f"{folder} holds the model after epoch {epoch.number} of {self.epochs}."
            workbench.show_epoch(epoch, self.epochs, prefix)

        try:
            history = recon.train(
                model,
                train,
                losses,
                optimizer=workbench.make_optimizer(self.problem, model, self.lr),
                scheduler=workbench.make_scheduler(self.problem, train, self.epochs),
                method=method,
                epochs=self.epochs,
                on_epoch=save,
                progress=workbench.shows_progress(),
            )
            run.seconds_per_step += history.seconds / history.steps
            return recon.evaluate(model, test, tasks)
        except KeyboardInterrupt as error:
            left = left or "No epoch was complete, so nothing was saved."
            raise TrainingStoppedError(f"Interrupted. {left}") from error
        except Exception:
            if left:
                print(left, file=sys.stderr)
            raise

    def _finish(self, run: Run) -> Run:
        run.finished = True
        run.save(self.folder)
        return run
