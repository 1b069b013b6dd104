"""`recon evaluate`: the metrics of a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import recon
from recon.support.tables import metrics_table
from recon_cli.options.problem import add_problem, problem_of
from recon_cli.parser import Report, add_device_option, add_verb, any_path, seed

if TYPE_CHECKING:
    import torch

    from recon import Problem
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        "evaluate a saved model on the test data",
        """
        recon evaluate digits --model joint
        recon evaluate digits --model recon4 --json
        """,
    )
    add_problem(parser)
    parser.add_argument("--model", type=any_path, required=True, metavar="FOLDER", help="what train or convert saved")
    parser.add_argument(
        "--seed", type=seed, help="seed of the loaders (default: the one that the model was trained with)"
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> Report:
    """Load and evaluate."""
    problem = problem_of(args)
    from recon.experiments.inputs import choose_device

    device = choose_device(args.device)
    results = _evaluate(problem, args.model, args.seed, device)
    data = {"model": str(args.model), "problem": problem.name, "results": results}
    return Report(metrics_table(results), data)


def _evaluate(problem: Problem, folder: Path, seed: int | None, device: torch.device) -> dict[str, dict[str, float]]:
    from recon.experiments import saved_models
    from recon.experiments.inputs import make_loaders, make_model

    record = saved_models.read_record(problem, folder)
    # A problem may split its data by the seed: with another one, the model would be tested on its training data.
    seed = (record.seed if record else 0) if seed is None else seed
    problem = saved_models.as_recorded(problem, record, folder)
    _, test = make_loaders(problem, seed, device)
    if record is None or not record.is_single_task:
        model, _ = saved_models.load_model(problem, folder, seed)
        return recon.evaluate(model.to(device), test, problem.tasks)
    results: dict[str, dict[str, float]] = {}
    for task in problem.tasks:
        model = recon.load(saved_models.task_folder(folder, task.name), make_model(problem, seed))
        results |= recon.evaluate(model.to(device), test, [task])
    return results
