"""Makes seeded models, loaders and example inputs from a problem. Imports torch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from recon.errors import ProblemError, UsageError, type_name
from recon.problems.loading import prepare
from recon.problems.problem import Problem
from recon.support import launch
from recon.support.loaders import refuse_dict
from recon.support.network.forward import Batch, Part, batch_parts, to_device
from recon.training.batches.accumulation import updates_of

_MOST_BATCHES = 20  # are looked at for one of each task
_SAMPLES = 8  # enough for batch norm, little enough to be quick


def choose_device(name: str | None) -> torch.device:
    """The device of this name, `cpu` or `cuda`, or the best there is; of several processes, each has its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no usable GPU here. Use the CPU: --device cpu (in Python, device='cpu').")
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, launch.local_number()) if name == "cuda" and launch.count() > 1 else torch.device(name)


def make_model(problem: Problem, seed: int) -> nn.Module:
    """A freshly initialised model on the CPU; the same seed gives the same weights.

    Raises:
        ProblemError: the problem's `make_model` gives something else.
    """
    seed_everything(seed)
    model = problem.make_model()
    if not isinstance(model, nn.Module):
        raise ProblemError(
            f"make_model of {problem.name!r} must return a torch.nn.Module, but returned {type_name(model)}."
        )
    return model


def seed_everything(seed: int) -> None:
    """Seed every source of chance that a problem's code may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
                f"make_loaders of {problem.name!r} must return (train loader, test loader), not {type_name(other)}."
            )


def threshold_of(problem: Problem, asked: float | None) -> float:
    """S: what was asked for, else the problem's own, else -0.1."""
    if asked is not None:
        return asked
    return problem.search.threshold if problem.search else -0.1


def first_batch(problem: Problem, loader: Iterable[Batch], device: torch.device) -> list[Part]:
    """The train loader's first batch, as the parts that run through the model at once.

    Where it has a target of one task alone, those of the batches that follow, until each task was seen.

    Raises:
        ProblemError: there is none, or it is no batch.
    """
    losses = problem.losses_of(problem.task_names)
    refuse_dict(loader)
    batches = (batch for batch in islice(loader, _MOST_BATCHES) if batch_parts(batch))
    for batch in batches:
        parts = batch_parts(batch)
        if len({task for part in parts for task in losses.present(part)}) == 1:
            parts = list(next(updates_of(chain([batch], batches), "tasks", losses)).parts)
        return to_device(parts, device)
    raise ProblemError(f"The train loader of {problem.name!r} gave no batch. Check that its data set is not empty.")


def example_inputs(problem: Problem, seed: int) -> Any:
    """Inputs on the CPU to count costs on: the problem's own examples, or a few samples of its first batch.

    Of a batch `{task name: (inputs, target)}`, those of its first task.
    """
    if problem.example_inputs is not None:
        return problem.example_inputs()
    loader, _ = make_loaders(problem, seed)
    return few_samples(first_batch(problem, loader, torch.device("cpu"))[0].inputs)[0]


def few_samples(inputs: Any) -> tuple[Any, int]:
    """The first samples of a batch of inputs, and how many those are.

    Inputs are cut only if every tensor in them has the batch's size first: whatever else there is, a graph say, is
    not ours to cut.
    """
    size = sample_count(inputs)
    if size is None:
        return inputs, next((size for size in _sizes(inputs) if size), 1)
    if size <= _SAMPLES:
        return inputs, size
    return tree_map(lambda leaf: leaf[:_SAMPLES], inputs), _SAMPLES


def sample_count(inputs: Any) -> int | None:
    """How many samples a batch of inputs has; None unless every tensor in it has that size first."""
    sizes = set(_sizes(inputs))
    return sizes.pop() if len(sizes) == 1 else None


def _sizes(inputs: Any) -> list[int | None]:
    return [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in tree_leaves(inputs)]
