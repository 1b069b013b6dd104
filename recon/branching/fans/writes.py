"""Writes in place: into fans, and of fans into plain tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recon.branching.fans.statement import augmented_assignment, stored_back, where
from recon.branching.fans.value import FanShell, common_refinement, fans_in
from recon.branching.fans.watch import refuse_write, watcher
from recon.branching.partition import Partition
from recon.errors import FanError
from recon.support.network.tensors import storage_of


def map_write(
    map_groups: Callable[..., Any],
    func: Callable[..., Any],
    name: str,
    written: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run `func`, named `name`, which writes in place into `written`, for every group, by `fan.map_groups`."""
    fans = [target for target in written if isinstance(target, FanShell)]
    plain = [target for target in written if not isinstance(target, FanShell)]
    common = common_refinement([fan._partition for fan in fans_in((args, dict(kwargs)))])
    if not plain:
        for target in fans:
            _separate(target, common)
        result = map_groups(func, args, kwargs)
        # `y.add_(x)` is y itself: aliases of the fan must go on seeing later writes.
        return written[0] if isinstance(result, FanShell) and len(written) == 1 else result
    watch = watcher()
    if watch and all(watch.shared_write(target, common) for target in plain):
        return map_groups(func, args, kwargs)
    if plain[0] is args[0] and augmented_assignment():
        # `y += fan` assigns to the name y, so y may become a fan; the old tensor stays as it was.
        result = map_groups(lambda y, *a, **k: func(y.clone(), *a, **k), args, kwargs)
        if watch:
            watch.mark_stale(plain[0])
        return result
    return refuse_write(name)


def assign_data(tensor: Tensor, value: FanShell, assign: Callable[[Tensor, Tensor], None]) -> None:
    """`tensor.data = value`, by `assign`, where the tensor itself has not fanned out."""
    watch = watcher()
    if watch:
        watch.passed_origins(value._origins)
        if watch.shared_write(tensor, value._partition):
            for part in value._by_group:
                assign(tensor, part.detach().clone())  # as a write in place would leave it: with memory of its own
            return
    way_out = (
        "Branch its layer as well; to change weights for good (merge adapters, say), take out a task's own model "
        "first: recon.extract_task(branched, task)."
        if isinstance(tensor, nn.Parameter)
        else "Make a new tensor instead (y = x for y.data = x), keep it as a buffer if it is a running statistic, or "
        "branch later layers only."
    )
    raise FanError(
        "An assignment to .data gives a tensor that all tasks share a value that differs between tasks"
        f"{where()}. {way_out}"
    )


def _separate(target: FanShell, common: Partition) -> None:
    """Split a fan about to be written into the groups of `common`, no two of them sharing memory."""
    if set(common.tasks) != set(target._partition.tasks):
        raise FanError(
            f"Values of {list(common.tasks)} only are written into values of {list(target._partition.tasks)}{where()}. "
            "Compute the values for all of these tasks, or make a new tensor instead."
        )
    values = [target.for_group(group) for group in common.groups]
    storages = [storage_of(value) for value in values]
    target._partition, target._by_group = common, values
    if len(set(storages)) == len(storages):
        return
    held = Counter(storages)
    target._by_group = [v.clone() if held[storage] > 1 else v for v, storage in zip(values, storages, strict=True)]
    watch = watcher()
    if watch and not stored_back():
        for old, new in zip(values, target._by_group, strict=True):
            if old is not new:
                watch.mark_stale(old)
