"""What the verbs make of a problem: seeded models, loaders, optimizers and example inputs. Imports torch."""

from __future__ import annotations

import inspect
import random
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import recon
from recon import models
from recon.batches import Batch, task_outputs, to_device, unpack
from recon.copies import copy_model
from recon.costs import Costs
from recon.documents import shown
from recon.errors import CheckpointError, FanError, ProblemError, UsageError
from recon.graph import reached_leaves
from recon.history import Epoch
from recon.layers import find_layers
from recon.problem import Problem
from recon.problems.loading import prepare
from recon.replacing import finish_replacing
from recon.runs import RUN_FILE, Run
from recon.stepper import task_losses
from recon.tables import metric_text
from recon.undisturbed import state_kept
from recon_cli import ranks
from recon_cli.backbones import is_own, with_backbone
from recon_cli.optimizers import make_optimizer
from recon_cli.recipe import Recipe
from recon_cli.terminal import tell

_MOST_LETTERS = 300  # of a name that a message shows to be copied
_SAMPLES = 8  # enough for batch norm, little enough to be quick


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names, or the best there is.

    Raises:
        UsageError: there is no GPU that torch can use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no usable GPU here. Take --device cpu.")
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, ranks.local_number()) if name == "cuda" and ranks.count() > 1 else torch.device(name)


def make_model(problem: Problem, seed: int) -> nn.Module:
    """A freshly initialised model on the CPU; the same seed gives the same weights.

    Raises:
        ProblemError: the problem's `make_model` gives something else.
    """
    seed_everything(seed)
    model = problem.make_model()
    if not isinstance(model, nn.Module):
        raise ProblemError(f"make_model of {problem.name!r} must return a torch.nn.Module, but gave {_kind(model)}.")
    return model


def seed_everything(seed: int) -> None:
    """Seed every source of chance that a problem's code may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_model(problem: Problem, folder: Path, seed: int) -> tuple[nn.Module, Run | None]:
    """A saved model on the CPU, and its record if it has one.

    Raises:
        CheckpointError: there is no model, or it is another problem's.
        UsageError: the folder holds one model for each task, or a model of another backbone than `--backbone`.
    """
    record = read_record(problem, folder)
    if record is not None and record.is_single_task:
        one = task_folder(folder, record.tasks[0])
        raise UsageError(f"{folder} holds one model for each task. Pass one of them, as in --model {one}.")
    return recon.load(folder, make_model(as_recorded(problem, record, folder), seed)), record


def read_record(problem: Problem, folder: Path) -> Run | None:
    """The record of the run in a folder; None for a model that was saved without one.

    Raises:
        CheckpointError: it cannot be read, or is another problem's.
    """
    finish_replacing(folder)
    if not (folder / RUN_FILE).exists():
        return None
    record = Run.load(folder)
    if record.problem != problem.name:
        raise CheckpointError(
            f"{folder} is a run of the problem {record.problem!r}, not of {problem.name!r}. Name that problem, or pass "
            "another folder."
        )
    return record


def as_recorded(problem: Problem, record: Run | None, folder: Path) -> Problem:
    """The problem with the network of the model in a folder.

    A record is no reason to import anything: of recon's own networks it names one; a network of the user's, the user
    names.

    Raises:
        CheckpointError: the record names no network that there is.
        UsageError: `--backbone` names another one, or is needed.
    """
    if record is None or record.backbone == problem.backbone:
        return problem
    own = is_own(record.backbone)
    if problem.backbone and not (own and is_own(problem.backbone)):
        raise UsageError(
            f"--backbone {problem.backbone} contradicts {folder}, whose model is "
            f"{_network(record.backbone)}. Leave --backbone out, or pass another folder."
        )
    if problem.backbone:  # the same file may lie elsewhere here; the weights tell whether it fits
        return problem
    if own:
        raise UsageError(
            f"The model in {folder} is {shown(record.backbone)}: code that is not recon's, and that is not run because "
            f"a file says so. If you trust it, name it yourself: {_backbone_option(record.backbone)}"
        )
    if record.backbone not in models.__all__:
        raise CheckpointError(
            f"{folder / RUN_FILE}: field 'backbone' is {shown(record.backbone)}, which is none of recon's networks. "
            "Train again with `recon train`."
        )
    return with_backbone(problem, record.backbone)


def _network(backbone: str) -> str:
    known = backbone in models.__all__
    return backbone if known else shown(backbone) if backbone else "the problem's own network"


def _backbone_option(backbone: str) -> str:
    """What to type for a recorded network, if it can be typed."""
    plain = backbone.isprintable() and len(backbone) <= _MOST_LETTERS
    return f"--backbone {shlex.quote(backbone) if plain else 'path/to/file.py:function'}"


def task_folder(folder: Path, task: str) -> Path:
    """Where a single-task run keeps a task's model."""
    return folder / task.replace("/", "_")


def make_loaders(
    problem: Problem, seed: int, device: torch.device | None = None
) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """The train and the test loader; with a device, ready to feed it (`recon.problems.loading.prepare`).

    Raises:
        ProblemError: the problem's `make_loaders` does not take a seed, or gives something else.
    """
    try:
        inspect.signature(problem.make_loaders).bind(seed)
    except TypeError as error:
        raise ProblemError(f"make_loaders of {problem.name!r} must take one argument, the seed: {error}.") from error
    match problem.make_loaders(seed):
        case (train, test):
            if device is not None:
                prepare(train, device)
                prepare(test, device)
            return train, test
        case other:
            raise ProblemError(
                f"make_loaders of {problem.name!r} must return (train loader, test loader), but gave {_kind(other)}."
            )


def threshold_of(problem: Problem, asked: float | None) -> float:
    """S: what was asked for, else the problem's own, else -0.1."""
    if asked is not None:
        return asked
    return problem.search.threshold if problem.search else -0.1


def first_batch(problem: Problem, loader: Iterable[Batch], device: torch.device) -> Batch:
    """The train loader's first batch.

    Raises:
        ProblemError: there is none, or it is no `(inputs, {task name: target})`.
    """
    for batch in loader:
        return to_device(unpack(batch), device)
    raise ProblemError(f"The train loader of {problem.name!r} gave no batch. Check that its data set is not empty.")


def example_inputs(problem: Problem, seed: int) -> Any:
    """Inputs on the CPU to count costs on: the problem's own examples, or a few samples of its first batch.

    Raises:
        ProblemError: the problem has no batch.
    """
    if problem.example_inputs is not None:
        return problem.example_inputs()
    loader, _ = make_loaders(problem, seed)
    return few_samples(first_batch(problem, loader, torch.device("cpu"))[0])[0]


def few_samples(inputs: Any) -> tuple[Any, int]:
    """The first samples of a batch of inputs, and how many those are.

    Inputs are cut only if every tensor in them has the batch's size first: whatever else there is, a graph say, is
    not ours to cut.
    """
    sizes = [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in tree_leaves(inputs)]
    size = next((size for size in sizes if size), 1)
    if set(sizes) != {size} or size <= _SAMPLES:
        return inputs, size
    return tree_map(lambda leaf: leaf[:_SAMPLES], inputs), _SAMPLES


def costs_per_sample(model: nn.Module, inputs: Any) -> Costs:
    """What a model costs, its multiply-adds and activations for one sample."""
    inputs, samples = few_samples(inputs)
    return _per_sample(recon.costs(model, None, inputs), samples)


def single_task_costs(model: nn.Module, tasks: tuple[str, ...], inputs: Any) -> Costs:
    """What one model for each task costs, all together, its multiply-adds and activations for one sample.

    A single-task model is the backbone and its own head, without the other tasks' heads. T of those are what is left
    when every shared layer is branched, so that is what is counted.
    """
    inputs, samples = few_samples(inputs)
    with state_kept(model):
        outputs = task_outputs(model.train(), inputs, tasks)
    reached = [reached_leaves([v for v in tree_leaves(outputs[t]) if isinstance(v, Tensor)]) for t in tasks]
    shared = [
        layer.name
        for layer in find_layers(model)
        if sum(not leaves.isdisjoint(layer.parameters.values()) for leaves in reached) > 1
    ]
    plan = recon.BranchPlan.per_task(shared, tasks) if shared else None
    try:
        costs = recon.costs(model, plan, inputs)
    except FanError as error:
        tell(f"Cannot leave the other tasks' heads out of the single-task costs: {error}")
        costs = recon.costs(model, None, inputs)
        size = costs.activation_bytes
        costs = Costs(
            len(tasks) * costs.parameters, len(tasks) * costs.macs, None if size is None else len(tasks) * size
        )
    return _per_sample(costs, samples)


def _per_sample(costs: Costs, samples: int) -> Costs:
    size = costs.activation_bytes
    return replace(costs, macs=costs.macs // samples, activation_bytes=None if size is None else size // samples)


class TrainingStep:
    """One joint training step after the other, on a copy of the model and one batch: something to time."""

    def __init__(self, problem: Problem, model: nn.Module, batch: Batch) -> None:
        self.model = copy_model(model).train()
        self.losses = problem.losses
        self.optimizer = make_optimizer(problem, self.model, Recipe())
        self.inputs, self.targets = batch

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        recon.backward(task_losses(self.model, self.inputs, self.targets, self.losses), self.model)
        self.optimizer.step()


def show_epoch(epoch: Epoch, epochs: int, prefix: str = "") -> None:
    """One line on stderr."""
    losses = ", ".join(f"{task} {loss:.4f}" for task, loss in epoch.losses.items())
    results = ", ".join(
        f"{task} {name} {metric_text(value)}"
        for task, metrics in epoch.results.items()
        for name, value in metrics.items()
    )
    skipped = f", {epoch.skipped} skipped" if epoch.skipped else ""
    text = f"{prefix}epoch {epoch.number}/{epochs}: loss {losses} ({epoch.steps} steps{skipped}, {epoch.seconds:.1f} s)"
    tell(f"{text}; test {results}" if results else text)


def shows_progress() -> bool:
    """Progress bars are for people: a log file gets a line an epoch."""
    return sys.stderr.isatty()


def _kind(value: Any) -> str:
    return type(value).__name__
