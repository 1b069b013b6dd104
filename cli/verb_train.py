"""`recon train`: any method on a plain or a branched model, or one model for each task."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon import problems
from recon.errors import GradientError, ReconError
from recon.runs import SINGLE_TASK, Run
from recon.tables import short_number
from recon_cli.outputs import check_folder
from recon_cli.parsing import METHOD, PROBLEM, Report, add_training_options, add_verb, positive_integer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from recon.problem import Loss, Problem
    from recon_cli.parsing import Verbs


class Interrupted(ReconError):
    """The user stopped the training; the message says what is left of it."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "train",
        run,
        "train a plain or a branched model, or one model for each task",
        """
        recon train digits --out joint
        recon train digits --model branched --method cagrad:c=0.5 --out recon
        recon train digits --single-task --out single
        recon compare joint recon single
        """,
        "The weights are saved after every epoch: Ctrl-C loses the epoch it falls into, no more.",
    )
    parser.add_argument("problem", metavar="PROBLEM", help=PROBLEM)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="start from this model, as `recon convert` or `recon train` wrote it"
    )
    parser.add_argument("--method", help=f"{METHOD} (default: joint)")
    parser.add_argument("--epochs", type=positive_integer, help="default: the problem's own")
    parser.add_argument("--single-task", action="store_true", help="train one model for each task: the baselines of Δm")
    add_training_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the run goes")


def run(args: argparse.Namespace) -> Report:
    """Train, evaluate, save."""
    if args.single_task and args.model:
        args.parser.error("--single-task trains fresh models, so it does not go with --model")
    if args.single_task and args.method not in (None, "joint"):
        args.parser.error(f"--single-task has no other task to weigh, so it does not go with --method {args.method}")
    check_folder(args.out)
    args.method = args.method or "joint"
    problem = problems.get(args.problem)
    recon.methods.parse(args.method)
    job = _Job.of(args, problem)
    record = job.train_single_tasks() if args.single_task else job.train_together(args.model, args.method)
    return _report(args, record)


@dataclass(frozen=True)
class _Job:
    """What all trainings of one command have in common."""

    problem: Problem
    seed: int
    epochs: int
    lr: float | None
    device: torch.device
    folder: Path

    @classmethod
    def of(cls, args: argparse.Namespace, problem: Problem) -> _Job:
        from recon_cli import workbench  # late: it imports torch

        device = workbench.choose_device(args.device)
        return cls(problem, args.seed, args.epochs or problem.epochs, args.lr, device, args.out)

    def train_together(self, source: Path | None, method: str) -> Run:
        """One model for all tasks."""
        from recon_cli import workbench

        if source is None:
            model, origin = workbench.make_model(self.problem, self.seed), None
        else:
            model, origin = workbench.load_model(self.problem, source, self.seed)
        layers = tuple(model.branch_plan.layers) if hasattr(model, "branch_plan") else ()
        surgery = origin.surgery if origin else f"K={len(layers)}" if layers else ""
        record = self.new_record(method, surgery, layers)
        model.to(self.device)
        train, test = workbench.make_loaders(self.problem, self.seed)
        inputs, _ = workbench.first_batch(self.problem, train, self.device)
        costs = workbench.costs_per_sample(model, inputs)
        record.parameters, record.macs = costs.parameters, costs.macs
        self.fit(record, model, self.problem.losses, method, self.folder)
        record.results = recon.evaluate(model, test, self.problem.tasks)
        return self.finish(record)

    def train_single_tasks(self) -> Run:
        """One model for each task."""
        from recon_cli import workbench

        record = self.new_record(SINGLE_TASK, "", ())
        results = {}
        for task in self.problem.tasks:
            model = workbench.make_model(self.problem, self.seed).to(self.device)
            train, test = workbench.make_loaders(self.problem, self.seed)
            if not results:
                inputs, _ = workbench.first_batch(self.problem, train, self.device)
                costs = workbench.single_task_costs(model, self.problem.task_names, inputs)
                record.parameters, record.macs = costs.parameters, costs.macs
            folder = workbench.task_folder(self.folder, task.name)
            self.fit(record, model, {task.name: task.loss}, "joint", folder)
            results.update(recon.evaluate(model, test, [task]))
        record.results = results
        return self.finish(record)

    def new_record(self, method: str, surgery: str, layers: tuple[str, ...]) -> Run:
        from recon.evaluation import directions

        return Run(
            problem=self.problem.name,
            label=f"{method} + {surgery}" if surgery else method,
            tasks=self.problem.task_names,
            method=method,
            surgery=surgery,
            branched_layers=layers,
            seed=self.seed,
            epochs=self.epochs,
            higher_is_better=directions(self.problem.tasks),
        )

    def fit(self, record: Run, model: nn.Module, losses: Mapping[str, Loss], method: str, folder: Path) -> None:
        """Train one model; its weights and the record are saved after every epoch."""
        import torch

        from recon_cli import workbench

        # Loaders and random state of its own: what was looked at before must not shift the order of the batches.
        loader, _ = workbench.make_loaders(self.problem, self.seed)
        torch.manual_seed(self.seed)
        saved = 0
        prefix = f"{next(iter(losses))}: " if record.is_single_task else ""

        def save(epoch: recon.Epoch) -> None:
            nonlocal saved
            record.history.append(asdict(epoch))
            record.save(self.folder)
            recon.save(model, folder)
            saved = epoch.number
            workbench.show_epoch(epoch, self.epochs, prefix)

        try:
            history = recon.train(
                model,
                loader,
                losses,
                optimizer=workbench.make_optimizer(self.problem, model, self.lr),
                method=method,
                epochs=self.epochs,
                on_epoch=save,
                progress=workbench.shows_progress(),
            )
        except (KeyboardInterrupt, GradientError) as error:
            left = f"{folder} holds the model after epoch {saved} of {self.epochs}."
            left = left if saved else "No epoch was complete, so nothing was saved."
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"Interrupted. {left}") from error
            raise GradientError(f"{error} {left}") from error
        record.seconds_per_step += history.seconds / history.steps

    def finish(self, record: Run) -> Run:
        record.finished = True
        record.save(self.folder)
        return record
