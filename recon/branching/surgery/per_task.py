"""mode="per-task": run the whole network once per task, for a forward that cannot work on fans."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon.branching.partition import Group, Partition
from recon.branching.surgery.copies import copy_model
from recon.branching.surgery.dry_run import with_inner
from recon.branching.surgery.task_view import ByTask, TaskView
from recon.errors import UsageError, shortened
from recon.support.network.forward import check_outputs, fresh, run
from recon.support.network.state import buffer_values, equal_values, perturb, refill, state_kept
from recon.support.network.tensors import equal


class PerTaskForward:
    """Replaces a branched model's forward: runs the original network once per task, with the task's copies."""

    def __init__(self, branched: nn.Module, tasks: Group) -> None:
        self.branched = branched
        self.tasks = tasks
        self.__signature__ = inspect.signature(branched.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the network once per task."""
        views = [TaskView(self.branched, task, self.tasks) for task in self.tasks]
        for view in views:
            vars(view.network).pop("forward", None)  # this object; the forward of its class is found then
        outputs = {}
        for view in views:
            # A task must not see what another's forward wrote into the inputs; the caller sees what the last one wrote.
            args_, kwargs_ = (args, kwargs) if view is views[-1] else fresh((args, kwargs))
            outputs[view.task] = check_outputs(view.network.forward(*args_, **kwargs_), self.tasks)[view.task]
        _keep_attributes(views)
        return outputs


def _keep_attributes(views: Sequence[TaskView]) -> None:
    """Let the branched model's modules remember what the forward has set in their views."""
    changes: dict[tuple[nn.Module, str], ByTask] = {}
    for view in views:
        for key, value in view.changes().items():
            changes.setdefault(key, ByTask())[view.task] = value
    for (module, name), by_task in changes.items():
        values = list(by_task.values())
        same = len(values) == len(views) and all(_is_same(values[0], value) for value in values[1:])
        kept = vars(module).get(name)
        if isinstance(kept, (list, dict, set)) and type(values[0]) is type(kept):
            # If the tasks fill it differently, it is a cache: kept by task, the model's methods could not clear it.
            if same:
                refill(kept, values[0])
            continue
        for view in views:
            by_task.setdefault(view.task, getattr(view.modules.get(module), name, None))
        vars(module)[name] = values[0] if same else by_task


def _is_same(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return list(value) == list(other) and _is_same(list(value.values()), list(other.values()))
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return value is other or (isinstance(value, (bool, int, float, str)) and value == other)


def find_statistics_by_value(branched: nn.Module, tasks: Group, example_inputs: Any) -> dict[str, Partition]:
    """`dry_run.find_statistics` for forwards that fans cannot pass: the modules whose buffers end up different.

    Each task's network runs once in training mode, from the same buffers and random state, with random numbers
    instead of the weights, so that no two copies are equal and no layer is cut off by a weight of zero.
    """
    twin = copy_model(branched).train()
    perturb(twin)
    paths = {module: path for path, module in twin.named_modules()}
    before = {module: buffer_values(module) for module in paths}
    after: dict[nn.Module, dict[str, dict[str, Tensor]]] = {}
    for task in tasks:
        with state_kept(twin):
            view = TaskView(twin, task)
            run(view.network, fresh(example_inputs))
            for module, seen in view.modules.items():
                after.setdefault(module, {})[task] = buffer_values(seen)
    found = {paths[module]: _partition(values) for module, values in after.items()}
    changed = {
        paths[module]: tuple(by_task)
        for module, by_task in after.items()
        if not all(equal_values(before[module], values) for values in by_task.values())
    }
    return with_inner(found, changed)


def refuse_repeated_writes(branched: nn.Module, tasks: Group, example_inputs: Any) -> None:
    """Raise UsageError if a forward, run for each task in turn, changes a shared parameter more than once.

    It would decay a weight once per task, say. A forward that writes the same values again (it normalises a weight)
    is fine.
    """
    twin = copy_model(branched)
    perturb(twin)
    names = dict(twin.named_parameters())
    for training in (True, False):
        with state_kept(twin.train(training)), torch.enable_grad():
            writers: dict[str, list[str]] = {}
            for task in tasks:
                before = {name: parameter.detach().clone() for name, parameter in names.items()}
                run(TaskView(twin, task, tasks).network, fresh(example_inputs))
                for name, parameter in names.items():
                    if not _close(parameter.detach(), before[name]):
                        writers.setdefault(name, []).append(task)
        for name, by in writers.items():
            if len(by) > 1:
                raise UsageError(
                    f"The forward writes into the parameter {name!r}, which the tasks {shortened(by)} share: with "
                    "mode='per-task' it would do so once per task. Move the statement out of the forward (after the "
                    "optimizer's step), branch the parameter's layer per task, or convert with mode='fan', which runs "
                    "the statement once."
                )


def _close(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape or not tensor.is_floating_point():
        return tensor.shape == other.shape and equal(tensor, other)
    scale = other.abs().max().item() if other.numel() else 0.0
    return torch.allclose(tensor, other, rtol=0, atol=8 * torch.finfo(tensor.dtype).eps * scale, equal_nan=True)


def _partition(values: Mapping[str, Mapping[str, Tensor]]) -> Partition:
    """Tasks with equal values make a group."""
    groups: list[list[str]] = []
    for task, mine in values.items():
        for group in groups:
            if equal_values(mine, values[group[0]]):
                group.append(task)
                break
        else:
            groups.append([task])
    return Partition.of_groups(groups, list(values))
