"""What profiling costs a step: a plain and a profiled one, timed on the same batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from recon.methods.gradients.observer import Memory
from recon.profiling.profiler import Profiler
from recon.profiling.sketches.sketch import SIZE
from recon.support.network.graph import reached_leaves
from recon.support.network.layers import Layer
from recon.support.timing import step_seconds

_SECONDS = 2.0  # to be spent on timing; steps longer than that are taken once each

Losses = Mapping[str, Tensor]


def step_prices(model: nn.Module, forward: Callable[[], Losses]) -> dict[str, float]:
    """The seconds of a step's forward and backward: `{"plain": ..., "exact": ..., "sketch": ...}`.

    The step's gradients are thrown away, and no optimizer steps; what else the forward changes is the caller's to put
    back.

    Args:
        model: the model.
        forward: computes `{task: loss}`.
    """
    leaves = {*model.parameters(), *reached_leaves(list(forward().values()))}  # a loss may have parameters of its own

    def plain() -> None:
        _forget(leaves)
        total: Tensor = sum(forward().values())  # type: ignore[assignment]
        total.backward()

    def profiled(memory: Memory) -> Callable[[], None]:
        profiler = Profiler(model, memory=memory)

        def step() -> None:
            _forget(leaves)
            profiler.backward(forward())

        return step

    steps = {"plain": plain, **{memory: profiled(memory) for memory in get_args(Memory)}}
    with gradients_kept(leaves):
        start = time.perf_counter()
        once = step_seconds(steps, rounds=1, warm_up=0)
        rounds = int(_SECONDS / (time.perf_counter() - start))
        return step_seconds(steps, rounds=min(rounds, 10), warm_up=0) if rounds else once


def memory_prices(shared: Mapping[str, tuple[str, ...]], layers: Iterable[Layer]) -> dict[str, int]:
    """The bytes that profiling a step holds on top of a plain one.

    `exact` holds what each task's gradient has in the shared layers, `sketch` one parameter's gradient and the
    sketches of all.

    Args:
        shared: `{layer: tasks}`, by which tasks each shared layer is reached.
        layers: these layers.
    """
    sizes = {layer.name: sum(p.nbytes for p in layer.parameters.values()) for layer in layers}
    largest = max((p.nbytes for layer in layers for p in layer.parameters.values()), default=0)
    tasks = {task for reached in shared.values() for task in reached}
    return {
        "exact": sum(len(reached) * sizes[name] for name, reached in shared.items()),
        "sketch": largest + len(tasks) * len(shared) * SIZE * torch.float32.itemsize,
    }


@contextmanager
def gradients_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the `.grad` of these tensors."""
    kept = [(tensor, tensor.grad) for tensor in tensors]
    _forget(tensor for tensor, _ in kept)
    try:
        yield
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient


def _forget(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None
