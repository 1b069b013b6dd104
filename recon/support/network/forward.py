"""Run a model on a batch: the form of batches, inputs and outputs, and the checks of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recon.errors import ProblemError, ReconError, UsageError, type_name
from recon.support.network.trees import map_tree

Tree = TypeVar("Tree")

Batch = Any
"""`(inputs, {task name: target})`, or `{task name: (inputs, target)}` where each task has inputs of its own.

A task whose target is missing or None is skipped for that step.
"""


class Part(NamedTuple):
    """What runs through the model at once: a batch, or what one task has of a joint batch."""

    inputs: Any
    targets: Mapping[str, Any]


class Inputs(NamedTuple):
    """The arguments of a forward that has several; any other value is the one argument of `model(inputs)`.

    A tuple, so that data loaders collate it and `to_device` moves it like any other nest.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def inputs(*args: Any, **kwargs: Any) -> Inputs:
    """Inputs for `model(*args, **kwargs)`, wherever recon accepts inputs: in a batch, or as example inputs."""
    return Inputs(args, kwargs)


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`, or `model(*args, **kwargs)` for `Inputs`."""
    if isinstance(inputs, Inputs):
        return model(*inputs.args, **inputs.kwargs)
    return model(inputs)


def run(model: nn.Module, example_inputs: Any) -> Mapping[str, Any]:
    """The model's outputs for the example inputs, in the mode it is in."""
    mode = "training" if model.training else "evaluation"
    try:
        # Dry runs watch operations, and `fullgraph=True` would fail on that: compiled parts run uncompiled.
        with torch.compiler.set_stance("force_eager"):
            return call(model, example_inputs)
    except ReconError:
        raise
    except Exception as error:
        raise UsageError(
            f"The model's forward fails on the example inputs in {mode} mode: {type(error).__name__}: {error}. Pass "
            "what the forward expects, as in training: the inputs of two samples or more, without their targets; for "
            "several arguments, recon.inputs(x, mask=mask)."
        ) from error


def fresh(inputs: Tree) -> Tree:
    """A copy of the inputs (nests, tensors, graph batches) for a forward that may write into them.

    Gradients reach the tensors that were given.
    """
    copies: dict[int, Any] = {}  # one tensor given twice stays one

    def own(leaf: Any) -> Any:
        if id(leaf) not in copies:
            copies[id(leaf)] = _own(leaf)
        return copies[id(leaf)]

    return cast("Tree", map_tree(own, inputs))


def _own(leaf: Any) -> Any:
    if isinstance(leaf, nn.Module) or not hasattr(leaf, "to"):
        return leaf
    # Tensors and graph batches can be cloned; of a tokenizer's output, at least the dict is copied.
    return leaf.clone() if hasattr(leaf, "clone") else copy.copy(leaf)


def model_device(model: nn.Module) -> torch.device:
    """Where the model's parameters are, or its buffers if it has none; the CPU for a model without either."""
    state = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if state is None else state.device


def to_device(batch: Tree, device: torch.device | str) -> Tree:
    """The same nest of tuples, lists and dicts with everything that has a `.to(device)` moved there.

    Tensors that are there already stay as they are. Copies from pinned memory overlap with computation.
    """
    return tree_map(lambda leaf: _leaf_to_device(leaf, device), batch, is_leaf=lambda node: hasattr(node, "to"))


def _leaf_to_device(leaf: Any, device: torch.device | str) -> Any:
    if isinstance(leaf, Tensor):
        # To the CPU, a copy that does not block could be read before it has arrived.
        return leaf.to(device, non_blocking=torch.device(device).type != "cpu")
    # A tokenizer's output or a graph batch knows how to move itself, but not all accept `non_blocking`.
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def batch_parts(batch: Any) -> list[Part]:
    """What of a batch runs through the model at once: all of it, or one task's inputs after the other.

    Raises:
        ProblemError: the batch is neither `(inputs, {task name: target})` nor `{task name: (inputs, target)}`.
    """
    match batch:
        case Inputs():
            got = "recon.inputs(...) without targets"
        case (inputs, Mapping() as targets):
            return [Part(inputs, targets)]
        case Mapping():
            return [part for task, pair in batch.items() if (part := _part_of(task, pair)) is not None]
        case list() | tuple():
            got = f"({', '.join(type(part).__name__ for part in batch)})"
        case _:
            got = type(batch).__name__
    raise ProblemError(
        f"A batch must be (inputs, {{task name: target}}), but the data loader gave {got}. "
        "Let the data set return (inputs, {'task name': target, ...}) for each sample. Where each task has a loader of "
        "its own, join them: recon.joint_loader({'task name': loader, ...})."
    )


def _part_of(task: Any, pair: Any) -> Part | None:
    """One task's inputs and target in a joint batch; None for a task that is absent."""
    if pair is None:
        return None
    if isinstance(task, str) and isinstance(pair, (tuple, list)) and not isinstance(pair, Inputs) and len(pair) == 2:
        return Part(pair[0], {task: pair[1]})
    got = f"({', '.join(type(part).__name__ for part in pair)})" if type(pair) in (tuple, list) else type_name(pair)
    raise ProblemError(
        f"A batch that is a dict must be {{task name: (inputs, target)}}, but the data loader gave one with {task!r}: "
        f"{got}. Where all tasks have the same inputs, a batch is (inputs, {{task name: target}})."
    )


def tasks_of(part: Part, tasks: Iterable[str]) -> list[str]:
    """Those of `tasks` that have a target in a part of a batch."""
    return [task for task in tasks if part.targets.get(task) is not None]


def task_outputs(model: nn.Module, inputs: Any, tasks: Iterable[str]) -> Mapping[str, Any]:
    """Run the model and check that its output has an entry for each of `tasks`."""
    return check_outputs(call(model, inputs), tasks)


def check_outputs(outputs: Any, tasks: Iterable[str]) -> Mapping[str, Any]:
    """A model's outputs, if they have an entry for each of `tasks`."""
    if not isinstance(outputs, Mapping):
        got = "Tensor" if isinstance(outputs, Tensor) else type_name(outputs)
        raise ProblemError(
            f"The model must return {{task name: output}}, but it returned {got}. Let its forward return a dict with "
            "one entry for each task, or name the outputs of a tuple: recon.name_outputs(model, ('seg', 'depth')), or "
            "Problem(output_names=('seg', 'depth')) for the command line."
        )
    missing = [task for task in tasks if task not in outputs]
    if missing:
        raise ProblemError(
            f"The model's output has no entry for task {', '.join(map(repr, missing))}; its entries are "
            f"{', '.join(map(repr, outputs)) or 'none'}. The names in the output must be the tasks' names."
        )
    return outputs
