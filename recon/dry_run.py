"""What dry forwards tell about a branched model: where statistics must follow the fan, and who serves whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recon.branches import Branches, TasksOnly, all_modules
from recon.errors import FanError, ReconError, UsageError
from recon.fan import TaskFan, partition_of, value_for
from recon.gradients import reached_leaves
from recon.partition import Group, Partition, refine
from recon.statement import where
from recon.trees import leaves_of
from recon.watch import equal, storage_of, watching


def find_statistics(branched: nn.Module, example_inputs: Any) -> dict[str, Partition]:
    """The modules with buffers into which a training forward writes values that differ between groups.

    BatchNorm is the usual one; anything that keeps running statistics is found, whatever its class and however it
    writes them.

    Raises:
        UsageError: the forward fails on the example inputs.
        FanError: a statement of it cannot work on fans, or the statistics are kept by the model as a whole.
    """
    owners = {
        storage_of(buffer): path
        for path, module in branched.named_modules()
        for buffer in module._buffers.values()
        if buffer is not None
    }
    found: dict[str, Partition] = {}

    def note(path: str, partition: Partition) -> None:
        found[path] = refine(found[path], partition) if path in found else partition

    def is_statistics(tensor: Tensor, partition: Partition) -> bool:
        path = owners.get(storage_of(tensor))
        if path is not None:
            note(path, partition)
        return path is not None

    with undisturbed(branched), _watch_writes(_Writes(is_statistics)):
        before = {path: _values(module) for path, module in branched.named_modules()}
        _run(branched.train(), example_inputs)
        for path, module in branched.named_modules():
            partition = partition_of(list(module._buffers.values()))
            if partition is not None:  # assigned anew
                note(path, partition)
        # A module that keeps statistics by group runs once per group, and so does whatever it holds.
        for outer in list(found):
            for inner, module in branched.get_submodule(outer).named_modules(prefix=outer):
                if inner != outer and not _equal(before[inner], _values(module)):
                    note(inner, found[outer].restrict(_tasks_at(inner, branched, found[outer].tasks)))
        found = {path: partition for path, partition in found.items() if len(partition.groups) > 1}
    if "" in found:
        raise FanError(
            f"{type(branched).__name__} itself keeps running statistics of values that differ between tasks. Move "
            "these buffers, and the statements that update them, into a submodule; or branch later layers only."
        )
    return found


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}


def _equal(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return values.keys() == others.keys() and all(
        type(others[name]) is Tensor and equal(value, others[name]) for name, value in values.items()
    )


def _tasks_at(path: str, model: nn.Module, tasks: Group) -> Group:
    """The tasks that a module runs for: within a copy, those of the copy's group."""
    module = model
    for name in path.split("."):
        if isinstance(module, Branches):
            tasks = tuple(task for task in tasks if task in name.split("+"))
        module = module.get_submodule(name)
    return tasks


def find_task_modules(branched: nn.Module, tasks: Group, example_inputs: Any) -> dict[str, Group]:
    """The outermost modules whose parameters serve some of the tasks only: running them for others is wasted.

    Which tasks a parameter serves is read off the autograd graph of each task's output. Where a task uses another
    one's result without its gradient (`detach()`, running statistics), the graph does not show it; then nothing is
    restricted.

    Raises:
        UsageError: the forward fails on the example inputs.
        FanError: a statement of it cannot work on fans.
    """
    with undisturbed(branched), _watch_fans(branched) as arriving, _watch_writes(_Writes()), torch.enable_grad():
        output = _run(branched.train(), example_inputs)
        serves: dict[Tensor, set[str]] = {}
        for task in tasks:
            leaves = [leaf for leaf in leaves_of(value_for(output[task], task)) if isinstance(leaf, Tensor)]
            for parameter in reached_leaves(leaves):
                serves.setdefault(parameter, set()).add(task)
    with undisturbed(branched), _watch_writes(_Writes()), torch.no_grad():
        _run(branched.eval(), example_inputs)
    copies = {copy for module in branched.modules() if isinstance(module, Branches) for copy in module.modules()}
    found: dict[str, Group] = {}
    for path, module in branched.named_modules():
        served = {task for p in module.parameters() for task in serves.get(p, ())}
        inside = module in copies or any(path.startswith(f"{outer}.") for outer in found)
        if path in arriving and 0 < len(served) < len(tasks) and not inside:
            found[path] = tuple(task for task in tasks if task in served)
    return found if _nobody_misses(branched, found, example_inputs) else {}


def _nobody_misses(branched: nn.Module, task_modules: Mapping[str, Group], example_inputs: Any) -> bool:
    """Whether every task has its output, and its statistics updated as often, if the modules run for these alone."""
    if not task_modules:
        return True
    writes = _buffer_writes(branched, example_inputs)
    handles = [
        branched.get_submodule(path).register_forward_pre_hook(TasksOnly(tasks), with_kwargs=True)
        for path, tasks in task_modules.items()
    ]
    try:
        restricted = _buffer_writes(branched, example_inputs)
        with undisturbed(branched), torch.no_grad():
            _run(branched.eval(), example_inputs)
    except FanError:
        return False
    finally:
        for handle in handles:
            handle.remove()
    idle = _buffers_of_others(branched, task_modules)
    return all(restricted[name] == count for name, count in writes.items() if name not in idle)


def _buffer_writes(branched: nn.Module, example_inputs: Any) -> dict[str, int | None]:
    """How often a training forward writes each buffer; `None` for one that it assigns anew."""
    with undisturbed(branched), torch.no_grad():
        before = {name: (buffer, buffer._version) for name, buffer in branched.named_buffers()}
        _run(branched.train(), example_inputs)
        after = dict(branched.named_buffers())
        return {
            name: buffer._version - version if after.get(name) is buffer else None
            for name, (buffer, version) in before.items()
        }


def _buffers_of_others(branched: nn.Module, task_modules: Mapping[str, Group]) -> set[str]:
    """The buffers, within modules that serve some tasks only, of groups in which none of these is."""
    return {
        f"{path}.{inner}.{name}" if inner else f"{path}.{name}"
        for path, tasks in task_modules.items()
        for inner, module in branched.get_submodule(path).named_modules()
        if isinstance(module, Branches)
        for group, part in module.items()
        if not set(tasks).intersection(group.split("+"))
        for name in [f"{group}.{buffer}" for buffer, _ in part.named_buffers()]
    }


def _run(branched: nn.Module, example_inputs: Any) -> Mapping[str, Any]:
    mode = "training" if branched.training else "evaluation"
    try:
        return branched(example_inputs)
    except ReconError:
        raise
    except Exception as error:
        raise UsageError(
            f"The model's forward fails on the example inputs in {mode} mode: {type(error).__name__}: {error}. Pass "
            "a batch of two or more samples, shaped and placed as in training."
        ) from error


class _Writes(TorchDispatchMode):
    """Fails where a tensor is read that the original would have written into, but a branched model has not.

    `x += fan` makes a new x out of a tensor that has not fanned out. The original changes the tensor itself, so that
    every other name and view of it sees the change.
    """

    def __init__(self, is_statistics: Callable[[Tensor, Partition], bool] = lambda tensor, partition: False) -> None:
        super().__init__()
        self.shared_write = is_statistics
        self.stale: dict[int, tuple[Tensor, Tensor]] = {}
        self.refusal: FanError | None = None

    def left_behind(self, tensor: Tensor) -> None:
        """Mark the tensor's elements in its storage."""
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        _, mask = self.stale.setdefault(storage_of(tensor), (tensor, torch.zeros(elements, dtype=torch.bool)))
        mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if TaskFan in types:
            try:
                TaskFan.__torch_dispatch__(func, types, args, kwargs)
            except FanError as error:
                self.refusal = error
                raise
        if self.stale and not func.is_view and any(self._is_stale(leaf) for leaf in tree_leaves((args, kwargs))):
            raise FanError(
                f"This uses a tensor that an earlier statement changes in place by values that differ between "
                f"tasks{where()}. Let that statement make a new tensor (y = y + x for y += x), or branch later layers "
                "only."
            )
        return func(*args, **(kwargs or {}))

    def _is_stale(self, leaf: object) -> bool:
        if not isinstance(leaf, Tensor) or storage_of(leaf) not in self.stale:
            return False
        marked, mask = self.stale[storage_of(leaf)]
        if leaf.itemsize != marked.itemsize:
            return True
        return bool(mask.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).any())


@contextmanager
def _watch_writes(writes: _Writes) -> Iterator[None]:
    try:
        with watching(writes), writes:
            yield
    except UsageError:
        if writes.refusal is not None:  # TorchScript makes an error of its own out of it
            raise writes.refusal from None
        raise


@contextmanager
def _watch_fans(model: nn.Module) -> Iterator[set[str]]:
    """Collect the paths of the modules that values which have fanned out reach."""
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
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what a forward changes: modes, buffers, what modules remember as attributes, and the random state."""
    kept = [(module, dict(vars(module)), dict(module._buffers), _values(module)) for module in all_modules(model)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        try:
            yield
        finally:
            for module, attributes, buffers, values in kept:
                vars(module).clear()
                vars(module).update(attributes)
                _put_back(module._buffers, buffers, values)


@torch.no_grad()
def _put_back(now: dict[str, Tensor | None], buffers: dict[str, Tensor | None], values: dict[str, Tensor]) -> None:
    for name in set(now.keys()).difference(buffers):
        del now[name]
    for name, buffer in buffers.items():
        if now[name] is not buffer:
            now[name] = buffer
        if buffer is not None and not equal(buffer, values[name]):
            buffer.copy_(values[name])
