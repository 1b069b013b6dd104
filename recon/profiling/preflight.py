"""Look at a model, its losses and the first batches before anything is trained: can conflicts be counted at all?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recon.errors import (
    GradientError,
    LoaderError,
    ProblemError,
    ReconError,
    UsageError,
)
from recon.methods.gradients.reach import compiled_as_one, find_reach
from recon.methods.updates.one_task_steps import FIRST
from recon.problems.losses import Losses, LossOfEach, TaskLosses, as_losses
from recon.profiling.findings import Preflight
from recon.support.network.forward import Batch, Part, batch_parts, call, check_outputs, fresh, model_device, to_device
from recon.support.network.graph import graph_behind
from recon.support.network.layer_choice import Patterns, choose_layers
from recon.support.network.layers import find_layers, unwrapped
from recon.support.network.state import state_kept
from recon.support.network.trainable import refuse_untrainable
from recon.support.random_states import global_states_kept
from recon.training.batches.absent import nothing_for
from recon.training.batches.accumulation import Accumulate, updates_of
from recon.training.batches.first_look import first_batches

LOOKED_AT = FIRST
"""How many batches of a loader are looked at, unless all tasks meet in the first."""


def refuse_unprofilable(
    model: nn.Module,
    loader: Iterable[Batch],
    losses: Losses | TaskLosses,
    accumulate: Accumulate = 1,
    *,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    units: Patterns | None = None,
) -> None:
    """Raise now what a profile would raise sooner or later; a training that follows does not notice the look.

    A loader that raises is left to the training, which says so when it gets there; one that is an iterator, which gives
    its batches once, is not looked at.

    Raises:
        ProblemError: model, losses and batches do not fit together, or a task is in no batch of a short loader.
        GradientError: a loss is not finite, or depends on no parameter.
        UsageError: no two tasks meet in the first batches, no layer is shared, or none of those chosen to be counted.
        UnknownNameError: an expression matches no layer.
    """
    losses = as_losses(losses)
    chosen = choose_layers(model, layers, exclude, units)
    with suppress(LoaderError):
        batches, found = look_ahead(model, losses, [], loader, accumulate)
        if batches:
            found.choose(chosen)
            found.refuse()


def refuse_lonely(loader: Iterable[Batch], losses: Losses | TaskLosses, accumulate: Accumulate = 1) -> None:
    """Refuse to train by a method that acts between tasks if no two of them meet in the loader's first batches.

    Raises:
        UsageError: none do.
    """
    losses = as_losses(losses)
    found = Preflight(losses.tasks, gathered=accumulate == "tasks")
    with suppress(LoaderError, ProblemError):  # the training says so when it gets there
        updates = [update.parts for update in updates_of(telling_batches(loader, losses), accumulate, losses)]
        found.batches = len(updates)
        for parts in updates:
            found.meet([task for part in parts for task in losses.present(part)], len(parts) > 1)
        if found.seen and not found.met and len(found.tasks) > 1:
            raise UsageError(found.nobody_meets())


def telling_batches(loader: Iterable[Batch], losses: TaskLosses) -> list[Batch]:
    """The loader's first batch, if all tasks meet in it, or else its first 20; none of an iterator."""
    first = first_batches(loader, 1) or []
    try:
        enough = not first or {t for part in batch_parts(first[0]) for t in losses.present(part)}.issuperset(
            losses.tasks
        )
    except ProblemError:  # to be told of when it is inspected
        enough = True
    return first if enough else first_batches(loader, LOOKED_AT) or []


def look_ahead(
    model: nn.Module,
    losses: TaskLosses,
    given: Sequence[Batch],
    loader: Iterable[Batch] | None,
    accumulate: Accumulate = 1,
) -> tuple[Sequence[Batch], Preflight]:
    """`inspect_batches` of those given, or of a loader's first: as many as it takes to see whether all tasks meet.

    Where a loader has fewer, that was its whole epoch: a task that is in none of them is a problem.

    Returns:
        The batches looked at, none if there are none, and what they show.

    Raises:
        LoaderError: the loader raised.
    """
    batches = drawn = given or (telling_batches(loader, losses) if loader is not None else [])
    found = inspect_batches(model, batches, losses, accumulate)
    if found.never_met and loader is not None and len(batches) == 1:
        drawn = first_batches(loader, LOOKED_AT) or []
        if drawn:
            batches, found = [*given, *drawn], inspect_batches(model, drawn, losses, accumulate, given)
    nothing = None
    if found.absent and loader is not None and drawn and len(drawn) < LOOKED_AT:
        nothing = nothing_for(found.absent, f"of the loader ({len(drawn)} in all)", losses, loader)
    found.judge(nothing)
    return batches, found


def inspect_batches(
    model: nn.Module,
    batches: Sequence[Batch],
    losses: TaskLosses,
    accumulate: Accumulate = 1,
    also: Sequence[Batch] = (),
) -> Preflight:
    """Run the model forward on the first batch of each task, and follow what the losses depend on.

    Nothing is computed backward, and nothing is changed: modes, parameters, buffers, random states stay as they were.

    Args:
        model: as `recon.profile` takes it.
        batches: the first of a loader, see `telling_batches`.
        losses: of the tasks.
        accumulate: which of the batches make one step, see `recon.train`.
        also: batches to run before these, which do not count.
    """
    found = Preflight(losses.tasks, len(batches), gathered=accumulate == "tasks")
    try:
        found.layers = find_layers(unwrapped(model))
        refuse_untrainable(model)
        updates = [update.parts for update in updates_of(batches, accumulate, losses)]
        uncounted = [batch_parts(batch) for batch in also]
    except ReconError as error:
        found.problems.append(error)
        return found
    found.batches = len(updates)
    with nothing_changed(model, losses):
        for extra in uncounted:
            _tasks_in(extra, found, model, losses)
        for parts in updates:
            found.meet(_tasks_in(parts, found, model, losses), len(parts) > 1)
    found.finished = not found.problems
    found.counted = found.finished or isinstance(losses, LossOfEach)  # else only the function knows
    return found


def _tasks_in(parts: Sequence[Part], found: Preflight, model: nn.Module, losses: TaskLosses) -> list[str]:
    """The tasks of a step; once there is a problem, nothing more is run, and the targets say it."""
    present = [] if found.problems else [task for part in parts for task in _tasks_of(part, found, model, losses)]
    return [task for part in parts for task in losses.present(part)] if found.problems else present


def _tasks_of(part: Part, found: Preflight, model: nn.Module, losses: TaskLosses) -> Iterable[str]:
    """The tasks that are present; it is run, unless their losses are known, and its targets say that they are there."""
    present = losses.present(part)
    if isinstance(losses, LossOfEach) and found.losses.keys() >= set(present):
        return present
    return _Look(found, model, losses).at(to_device(part, model_device(model)))


def nothing_changed(model: nn.Module, losses: TaskLosses) -> ExitStack:
    """A block in which the model may run as in training; afterwards everything is as before."""
    block = ExitStack()
    for module in [model, *losses.modules]:
        block.enter_context(state_kept(module))
    block.enter_context(global_states_kept())
    block.enter_context(torch.enable_grad())
    model.train()
    return block


@dataclass(frozen=True)
class _Look:
    """A look at one forward."""

    found: Preflight
    model: nn.Module
    losses: TaskLosses

    def at(self, part: Part) -> Iterable[str]:
        """Note the losses, and which layers they reach; gives the tasks that have one."""
        try:
            outputs = check_outputs(call(self.model, fresh(part.inputs)), self.losses.needed(part) or ())
        except Exception as error:
            self.found.problems.append(error)
            return []
        present = self.losses.present(part)
        if isinstance(self.losses, LossOfEach):  # a loss of the whole batch may use them all
            self.found.unused = tuple(str(name) for name in outputs if name not in self.losses.tasks)
        for task, others in _reads({task: outputs[task] for task in present if task in outputs}).items():
            self.found.reads[task] = tuple(dict.fromkeys((*self.found.reads.get(task, ()), *others)))
        before = len(self.found.problems)
        found = self._losses(outputs, part, present)
        self.found.losses = {t: float(loss.detach()) for t, loss in found.items()} | self.found.losses
        if len(self.found.problems) == before and found:
            self._follow(found)
        return found

    def _losses(self, outputs: Mapping[str, Any], part: Part, present: Sequence[str]) -> dict[str, Tensor]:
        """Those that can be computed; of a function for each task, one that fails does not hide the others."""
        each = isinstance(self.losses, LossOfEach)
        found: dict[str, Tensor] = {}
        for losses in [self.losses.only([task]) for task in present] if each else [self.losses]:
            try:
                found |= losses.of(outputs, part)
            except Exception as error:
                self.found.problems.append(error)
        self.found.problems += [
            GradientError(
                f"The loss of task {task!r} is {float(loss.detach())} before anything is trained. Look at that "
                "task's outputs and targets in the first batch: values that are not finite, a logarithm or "
                "division of zero, an empty mask."
            )
            for task, loss in found.items()
            if not loss.isfinite()
        ]
        return found

    def _follow(self, losses: Mapping[str, Tensor]) -> None:
        layers = self.found.layers
        parameters = [p for layer in layers for p in layer.parameters.values()]
        try:
            reach = find_reach(losses, parameters)
        except ReconError as error:
            self.found.problems.append(error)
            return
        name_of = {p: layer.name for layer in layers for p in layer.parameters.values()}
        reached = {task: {name_of[p] for p in found} for task, found in reach.parameters.items()}
        for layer in layers:
            before = self.found.reached.pop(layer.name, ())
            tasks = {*before, *(task for task, names in reached.items() if layer.name in names)}
            if tasks:
                self.found.reached[layer.name] = tuple(task for task in self.found.tasks if task in tasks)
        if compiled_as_one(losses):
            self.found.warnings.append(
                "The tasks' heads are compiled as one with the shared layers. Methods that work between the two "
                "(rotograd) need the shared body and the heads compiled separately."
            )


def _reads(outputs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tasks whose output is computed from those of others, as far as the graph shows it."""
    tensors = {task: [v for v in tree_leaves(output) if isinstance(v, Tensor)] for task, output in outputs.items()}
    made_by = {task: {v.grad_fn for v in own if v.grad_fn is not None} for task, own in tensors.items()}
    found = {}
    for task, own in tensors.items():
        behind = graph_behind(own)[0].keys()
        others = tuple(t for t, nodes in made_by.items() if nodes & behind and nodes.isdisjoint(made_by[task]))
        if others:
            found[task] = others
    return found
