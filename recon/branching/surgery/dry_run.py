"""Dry forwards of a branched model: which statistics differ between tasks, and which modules serve which task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recon.branching.fans.trees import partition_of, value_for
from recon.branching.modules.branched import Branches
from recon.branching.modules.hooks import TasksOnly
from recon.branching.partition import Group, Partition, refine
from recon.branching.surgery.write_guard import WriteGuard, watch_writes, way_out
from recon.errors import FanError, UsageError, shortened
from recon.support.network.forward import fresh, run
from recon.support.network.graph import reached_leaves
from recon.support.network.hooks import hooked
from recon.support.network.state import buffer_values, equal_values, move_statistics, state_kept
from recon.support.network.tensors import storage_of
from recon.support.network.trees import leaves_of


def find_statistics(branched: nn.Module, example_inputs: Any) -> dict[str, Partition]:
    """The modules with buffers into which a training forward writes values that differ between groups.

    BatchNorm is the usual one; anything that keeps running statistics is found, whatever its class and however it
    writes them.
    """
    owners: dict[tuple[str, int], str] = {}
    for path, module in branched.named_modules():
        for buffer in module._buffers.values():
            if buffer is not None:
                # `buffer.data = value` gives it another storage, and a view of it is another tensor.
                owners["tensor", id(buffer)] = owners["storage", storage_of(buffer)] = path
    found: dict[str, Partition] = {}

    def note(path: str, partition: Partition) -> None:
        found[path] = refine(found[path], partition) if path in found else partition

    def is_statistics(tensor: Tensor, partition: Partition) -> bool:
        path = owners.get(("tensor", id(tensor)), owners.get(("storage", storage_of(tensor))))
        if path is not None:
            note(path, partition)
        return path is not None

    with state_kept(branched), watch_writes(WriteGuard(is_statistics)):
        move_statistics(branched)
        before = {path: buffer_values(module) for path, module in branched.named_modules()}
        run(branched.train(), fresh(example_inputs))
        for path, module in branched.named_modules():
            partition = partition_of(list(module._buffers.values()))
            if partition is not None:  # the forward has assigned a new one
                note(path, partition)
        changed = [p for p, module in branched.named_modules() if not equal_values(before[p], buffer_values(module))]
        everybody = tuple(dict.fromkeys(task for partition in found.values() for task in partition.tasks))
        found = with_inner(found, {path: _tasks_at(path, branched, everybody) for path in changed})
    if "" in found:
        raise FanError(
            f"{type(branched).__name__} itself keeps running statistics of values that differ between tasks. Move "
            "these buffers, and the statements that update them, into a submodule; or branch later layers only. "
            f"{way_out()}"
        )
    return found


def with_inner(found: Mapping[str, Partition], changed: Mapping[str, Group]) -> dict[str, Partition]:
    """`found`, and the modules inside these that write buffers: they run once per group as well.

    `changed` has the modules that write buffers, and the tasks they run for.
    """
    result = dict(found)
    for path, tasks in changed.items():
        around = [found[outer].restrict(tasks) for outer in found if path.startswith(f"{outer}.")]
        own = [found[path]] if path in found else []
        if around:
            result[path] = refine(*own, *around)
    return {path: partition for path, partition in result.items() if len(partition.groups) > 1}


def _tasks_at(path: str, model: nn.Module, tasks: Group) -> Group:
    """The tasks that a module runs for: within a copy, those of the copy's group."""
    module: nn.Module | None = model
    for name in filter(None, path.split(".")):
        if isinstance(module, Branches):
            tasks = tuple(task for task in tasks if task in name.split("+"))
        module = None if module is None else module._modules[name]  # scripted modules have no get_submodule
    return tasks


def find_task_modules(branched: nn.Module, tasks: Group, example_inputs: Any, original: nn.Module) -> dict[str, Group]:
    """The outermost modules whose parameters serve some of the tasks only: running them for others is wasted.

    Which tasks a parameter serves is read off the autograd graph of each task's output. Where a task uses another
    one's result without its gradient (`detach()`, running statistics), the graph does not show it; then nothing is
    restricted.
    """
    with state_kept(branched), _watch_fans(branched) as arriving, watch_writes(WriteGuard()), torch.enable_grad():
        output = run(branched.train(), fresh(example_inputs))
        refuse_foreign({task: value_for(output[task], task) for task in tasks}, original)
        serves: dict[Tensor, set[str]] = {}
        for task in tasks:
            leaves = [leaf for leaf in leaves_of(value_for(output[task], task)) if isinstance(leaf, Tensor)]
            for parameter in reached_leaves(leaves):
                serves.setdefault(parameter, set()).add(task)
    with state_kept(branched), watch_writes(WriteGuard()), torch.no_grad():
        run(branched.eval(), fresh(example_inputs))
    copies = {copy for module in branched.modules() if isinstance(module, Branches) for copy in module.modules()}
    found: dict[str, Group] = {}
    for path, module in branched.named_modules():
        served = {task for p in module.parameters() for task in serves.get(p, ())}
        inside = module in copies or any(path.startswith(f"{outer}.") for outer in found)
        if path in arriving and 0 < len(served) < len(tasks) and not inside:
            found[path] = tuple(task for task in tasks if task in served)
    return found if _all_tasks_complete(branched, found, example_inputs) else {}


def refuse_foreign(outputs: Mapping[str, Any], original: nn.Module) -> None:
    """Raise UsageError if the copy of a model still computes with the original's parameters."""
    leaves = reached_leaves([leaf for leaf in leaves_of(dict(outputs)) if isinstance(leaf, Tensor)])
    foreign = [name for name, parameter in original.named_parameters() if parameter in leaves]
    if foreign:
        raise UsageError(
            f"A copy of the model still uses {shortened(foreign)} of the original: its forward calls a function (a "
            "lambda, say) that was made with the original in its closure, which a copy does not change. Make it a "
            "method."
        )


def _all_tasks_complete(branched: nn.Module, task_modules: Mapping[str, Group], example_inputs: Any) -> bool:
    """Whether all tasks keep their outputs and updates of statistics if these modules run for these tasks only."""
    if not task_modules:
        return True
    writes = _buffer_writes(branched, example_inputs)
    hooks = (
        branched.get_submodule(path).register_forward_pre_hook(TasksOnly(tasks), with_kwargs=True)
        for path, tasks in task_modules.items()
    )
    try:
        with hooked(hooks):
            restricted = _buffer_writes(branched, example_inputs)
            with state_kept(branched), torch.no_grad():
                run(branched.eval(), fresh(example_inputs))
    except FanError:
        return False
    idle = _buffers_of_others(branched, task_modules)
    return all(restricted[name] == count for name, count in writes.items() if name not in idle)


def _buffer_writes(branched: nn.Module, example_inputs: Any) -> dict[str, int | None]:
    """How often a training forward writes each buffer; `None` for one that it replaces (the buffer or its `.data`)."""
    with state_kept(branched), torch.no_grad():
        before = {name: (buffer, buffer._version, storage_of(buffer)) for name, buffer in branched.named_buffers()}
        run(branched.train(), fresh(example_inputs))
        after = dict(branched.named_buffers())
        return {
            name: buffer._version - version if after.get(name) is buffer and storage_of(buffer) == storage else None
            for name, (buffer, version, storage) in before.items()
        }


def _buffers_of_others(branched: nn.Module, task_modules: Mapping[str, Group]) -> set[str]:
    """Buffers in modules that serve some tasks only, kept for groups that have none of these tasks."""
    return {
        f"{path}.{inner}.{name}" if inner else f"{path}.{name}"
        for path, tasks in task_modules.items()
        for inner, module in branched.get_submodule(path).named_modules()
        if isinstance(module, Branches)
        for group, part in module.items()
        if not set(tasks).intersection(group.split("+"))
        for name in [f"{group}.{buffer}" for buffer, _ in part.named_buffers()]
    }


@contextmanager
def _watch_fans(model: nn.Module) -> Iterator[set[str]]:
    """Collect the paths of the modules that get fans among their inputs."""
    reached: set[str] = set()

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if partition_of((args, kwargs)) is not None:
                reached.add(path)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True)
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # they take no hooks, and no fans either
    ]
    with hooked(handles):
        yield reached
