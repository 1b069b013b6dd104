"""`recon train`: any method on a plain or a branched model, or one model for each task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon import problems
from recon.errors import UsageError
from recon.experiments import Run
from recon.experiments.run import RUN_FILE, SINGLE_TASK
from recon.experiments.training.evaluations import Evaluations
from recon.experiments.training.run_folder import CHECKPOINT_FILE, RUN_MARKS
from recon.support import launch
from recon_cli.options.outputs import claimed_folder
from recon_cli.options.problem import add_problem, model_backbone, problem_of
from recon_cli.options.recipe import add_recipe_options, recipe_of
from recon_cli.parser import METHOD, Report, add_training_options, add_verb, any_path, not_empty, positive_integer
from recon_cli.progress import shows_progress
from recon_cli.terminal import tell

if TYPE_CHECKING:
    from recon import Problem
    from recon.experiments import Training
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "train",
        run,
        "train a plain or a branched model, or one model for each task",
        """
        recon train digits --out joint
        recon train digits --model branched --method cagrad:c=0.5 --out recon4
        recon train digits --optimizer adamw --lr 0.002 --schedule cosine --warm-up 0.05 --clip 1 --out joint
        recon train digits --backbone ResNet18 --schedule step --milestones 4 5 --out resnet
        recon train digits --single-task --out single
        recon train digits --out joint --resume
        torchrun --nproc-per-node 2 -m recon_cli train digits --out joint
        recon compare joint recon4 single
        """,
        "FOLDER gets the model after the last epoch, the best one in FOLDER/best, and a line for every step in "
        "metrics.jsonl. Until it is done, a checkpoint in there keeps the training: Ctrl-C loses nothing, anything "
        "else that ends it a minute at most.",
    )
    add_problem(parser)
    parser.add_argument(
        "--model",
        type=not_empty,
        metavar="MODEL",
        help="the folder of a model to start from, which convert or train saved; or a name that --backbone accepts",
    )
    parser.add_argument("--method", help=f"{METHOD} (default: joint)")
    parser.add_argument("--epochs", type=positive_integer, help="epochs to train (default: the problem's own)")
    parser.add_argument("--single-task", action="store_true", help="train one model for each task: the baselines of Δm")
    add_training_options(parser)
    add_recipe_options(parser)
    parser.add_argument(
        "--evaluate-every",
        type=positive_integer,
        default=1,
        metavar="N",
        help="evaluate every N epochs, and after the last (default: 1)",
    )
    parser.add_argument(
        "--best-by",
        metavar="TASK.METRIC",
        help="the metric that decides which epoch is best (default: the mean relative gain on the first evaluation)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's events into FOLDER/tensorboard")
    parser.add_argument("--out", type=any_path, required=True, metavar="FOLDER", help="where the run goes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in FOLDER; without one, start from the beginning",
    )


def run(args: argparse.Namespace) -> Report:
    """Train, evaluate, save."""
    if args.single_task and args.method not in (None, "joint"):
        args.parser.error(f"--single-task has one task at a time, so it does not go with --method {args.method}")
    if args.single_task and args.best_by:
        args.parser.error("--single-task keeps the best model of each task, so it does not go with --best-by")
    with claimed_folder(args.out, RUN_MARKS) as begins:
        return _run(args, begins)


def _run(args: argparse.Namespace, begins: bool) -> Report:
    backbone = _backbone(args)
    problem = problem_of(args)
    if backbone:
        from recon.experiments import with_backbone  # late: it imports torch

        problem = with_backbone(problem, backbone)
    recon.methods.parse("joint" if args.method is None else args.method)
    job = _job(args, problem, None if backbone or not args.model else Path(args.model))
    from recon_cli.interruptions import check_resume, resumable  # late: these import torch
    from recon_cli.texts.training import report

    check_resume(args)
    _refuse_other_checkpoints(job)
    # A training that was killed before it saved anything was going to replace the run that is there.
    finished = None if begins else _finished(args, job)
    replaces = (args.out / RUN_FILE).exists() and not args.resume and not any(path.exists() for path in job.checkpoints)
    if finished is None and launch.number() == 0 and replaces:
        tell(f"note: the run in {args.out} will be replaced.")
    if finished is not None:
        tell(f"{args.out} is finished; there is nothing to resume.")
        return report(job, finished)
    with launch.joined(job.device), resumable(args, job.checkpoints, job.left):
        trained = job.run()
    return report(job, trained)


def _backbone(args: argparse.Namespace) -> str:
    """The backbone that `--model` names; empty if it names a folder, or nothing."""
    backbone = model_backbone(args.model) if args.model else ""
    if backbone and args.backbone:
        args.parser.error(f"--model {args.model} is a backbone, so it does not go with --backbone {args.backbone}")
    if backbone and args.pretrained is not None:
        args.parser.error(f"--pretrained is for the problem's own network, so it does not go with --model {args.model}")
    return backbone


def _job(args: argparse.Namespace, problem: Problem, source: Path | None) -> Training:
    epochs = args.epochs or problem.epochs
    recipe, evaluations = recipe_of(args, epochs), Evaluations(args.evaluate_every, args.best_by)
    from recon.experiments.inputs import choose_device
    from recon.experiments.training import tensorboard, training
    from recon.training.evaluation import directions  # late: these import torch

    evaluations.check(directions(problem.tasks))
    if args.tensorboard:
        tensorboard.check_tensorboard()
    if args.single_task and source is not None:
        args.parser.error("--single-task trains fresh models, so it does not go with the folder of one in --model")
    return training.Training(
        problem=problem,
        folder=args.out,
        epochs=epochs,
        seed=args.seed,
        recipe=recipe,
        device=choose_device(args.device),
        method=SINGLE_TASK if args.single_task else args.method or "joint",
        source=source,
        train_samples=args.train_samples,
        evaluations=evaluations,
        tensorboard=args.tensorboard,
        resume=args.resume,
        home=problems.home_of(args.problem),
        tell=tell,
        progress=shows_progress(),
    )


def _refuse_other_checkpoints(job: Training) -> None:
    for path in [*job.folder.glob(CHECKPOINT_FILE), *job.folder.glob(f"*/{CHECKPOINT_FILE}")]:
        if path not in job.checkpoints:
            raise UsageError(
                f"{path} is of another training, which was interrupted. Go on with that one, choose another --out, or "
                "delete the file."
            )


def _finished(args: argparse.Namespace, job: Training) -> Run | None:
    """The finished run in the folder, if `--resume` finds one; refused if the command would make another."""
    if not args.resume or not (args.out / RUN_FILE).exists() or any(path.exists() for path in job.checkpoints):
        return None
    found = Run.load(args.out)
    if not found.finished:
        return None
    asked = {"problem": job.problem.name, "epochs": job.epochs, **job.settings()}
    had = {"problem": found.problem, "epochs": found.epochs, **found.settings}
    for name, value in asked.items():
        if had.get(name) != value:
            raise UsageError(
                f"{args.out} is another run, and finished: its {name} is {had.get(name)}, not {value}. There is "
                "nothing to resume: choose another --out, or leave --resume out to replace it."
            )
    return found
