"""What one dry forward tells about a branched model: where statistics must follow the fan, and who serves whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recon.branches import TasksOnly
from recon.errors import FanError, ReconError, UsageError
from recon.fan import partition_of, value_for
from recon.gradients import reached_leaves
from recon.partition import Group, Partition, refine


def find_statistics(branched: nn.Module, example_inputs: Any) -> dict[str, Partition]:
    """The modules that change their own buffers in a training forward and that fanned values reach.

    BatchNorm is the usual one; anything that keeps running statistics is found, whatever its class.

    Raises:
        UsageError: the forward fails on the example inputs.
    """
    with undisturbed(branched), _watch_fans(branched) as arriving:
        branched.train()
        before = {path: _own_buffers(module) for path, module in branched.named_modules()}
        _run(branched, example_inputs, "training")
        return {
            path: arriving[path]
            for path, module in branched.named_modules()
            if path in arriving and _changed(before[path], module)
        }


def find_task_modules(branched: nn.Module, tasks: Group, example_inputs: Any) -> dict[str, Group]:
    """The outermost modules whose parameters serve some of the tasks only: running them for others is wasted.

    Which tasks a parameter serves is read off the autograd graph of each task's output. Where a task uses another
    one's result without its gradient (`detach()`), the graph does not show it; then nothing is restricted.
    """
    with undisturbed(branched), _watch_fans(branched) as arriving, torch.enable_grad():
        branched.train()
        output = _run(branched, example_inputs, "training")
        serves: dict[Tensor, set[str]] = {}
        for task in tasks:
            leaves = [leaf for leaf in tree_leaves(value_for(output[task], task)) if isinstance(leaf, Tensor)]
            for parameter in reached_leaves(leaves):
                serves.setdefault(parameter, set()).add(task)
    found: dict[str, Group] = {}
    for path, module in branched.named_modules():
        served = {task for p in module.parameters() for task in serves.get(p, ())}
        inside = any(path.startswith(f"{outer}.") for outer in found) or "branches" in path.split(".")
        if path in arriving and 0 < len(served) < len(tasks) and not inside:
            found[path] = tuple(task for task in tasks if task in served)
    return found if _covers_every_task(branched, found, example_inputs) else {}


def _covers_every_task(branched: nn.Module, task_modules: Mapping[str, Group], example_inputs: Any) -> bool:
    handles = [
        branched.get_submodule(path).register_forward_pre_hook(TasksOnly(tasks), with_kwargs=True)
        for path, tasks in task_modules.items()
    ]
    try:
        with undisturbed(branched), torch.no_grad():
            for mode in (True, False):
                _run(branched.train(mode), example_inputs, "training" if mode else "evaluation")
    except FanError:
        return False
    finally:
        for handle in handles:
            handle.remove()
    return True


def _run(branched: nn.Module, example_inputs: Any, mode: str) -> Mapping[str, Any]:
    try:
        return branched(example_inputs)
    except ReconError:
        raise
    except Exception as error:
        raise UsageError(
            f"The model's forward fails on the example inputs in {mode} mode: {type(error).__name__}: {error}. Pass "
            "a batch of two or more samples, shaped and placed as in training."
        ) from error


@contextmanager
def _watch_fans(model: nn.Module) -> Iterator[dict[str, Partition]]:
    """Collect, by module path, the groups into which the values that reach each module have fanned out."""
    arriving: dict[str, Partition] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            partition = partition_of((args, kwargs))
            if partition is not None:
                arriving[path] = refine(arriving[path], partition) if path in arriving else partition

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True) for path, module in model.named_modules()
    ]
    try:
        yield arriving
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back every module's mode, every buffer and the random state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


def _own_buffers(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    return {name: (b, b._version) for name, b in module._buffers.items() if b is not None}


def _changed(before: Mapping[str, tuple[Tensor, int]], module: nn.Module) -> bool:
    after = _own_buffers(module)
    return after.keys() != before.keys() or any(
        after[name][0] is not buffer or after[name][1] != version for name, (buffer, version) in before.items()
    )
