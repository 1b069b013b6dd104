"""The backward passes of a step: one a task, whose gradients are handed over as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.gradients.held import held
from recon.methods.gradients.reach import Reach
from recon.support.network.hooks import hooked

_LARGE = 1 << 14  # scalars in a parameter whose gradient is worth a hook

Receive = Callable[[int, list[Tensor], list[Tensor]], None]
"""Takes the number of a task, leaves, and the task's gradients there, which it must not keep or change.

Sparse ones come as autograd made them, see `recon.methods.gradients.sparse`.
"""


def differentiate(
    losses: Mapping[str, Tensor],
    reach: Reach,
    buffers: Iterable[Tensor],
    receive: Receive,
    retain_graph: bool = False,
) -> None:
    """A backward pass for each loss, which hands over every large gradient as soon as it is whole, and keeps none.

    A gradient that has just been made is still in the cache, and its memory is free for the next: this is quicker
    than collecting the gradients first, and takes less memory. (Small ones are collected: a hook costs more.)

    The losses are of all the tasks of `reach` or some of them. The model's buffers end as one backward pass leaves
    them: one that runs a part of the forward again (activation checkpoints) moves running statistics. The graph is
    freed, unless `retain_graph` says that other losses still need it.
    """
    present = [(number, task) for number, task in enumerate(reach.tasks) if task in losses]
    watched = [(buffer, buffer._version) for buffer in buffers]
    after_one: list[Tensor] = []
    for number, task in present:
        leaves = [*reach.parameters[task], *reach.outside.get(task, [])]
        # Only the last pass may free the graph: the tasks share its trunk.
        _pass(number, losses[task], leaves, retain_graph or (number, task) != present[-1], receive)
        # BatchNorm's counter shows that it was moved; its running mean and variance do not.
        if (number, task) == present[0] and any(buffer._version != version for buffer, version in watched):
            after_one = [buffer.clone() for buffer, _ in watched]
    with torch.no_grad():
        for (buffer, _), kept in zip(watched, after_one, strict=False):
            buffer.copy_(kept)


def _pass(number: int, loss: Tensor, leaves: list[Tensor], retain_graph: bool, receive: Receive) -> None:
    known = held(loss)
    if known is not None:
        there = [leaf for leaf in leaves if leaf in known.gradients]
        receive(number, there, [known.gradients[leaf] for leaf in there])
        return
    large = {leaf for leaf in leaves if leaf.numel() >= _LARGE}
    # The latest hook runs last: what the user's own hooks make of the gradient is what counts.
    with hooked(leaf.register_hook(_hand_over(number, leaf, receive)) for leaf in large), several_passes():
        found = torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)
    small = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None and leaf not in large]
    receive(number, [leaf for leaf, _ in small], [gradient for _, gradient in small])


@contextmanager
def whole_graph(message: str) -> Iterator[None]:
    """Around a backward pass; an error with this message if an earlier one has freed a part of the graph."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise UsageError(message) from error


@contextmanager
def several_passes() -> Iterator[None]:
    """Around a backward pass that keeps the graph; an error if a compiled backward was made for a single one."""
    try:
        yield
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise UsageError(
            "Recon needs a backward pass for each task, but the model was compiled for a single backward pass, in "
            "which its buffers are used up. Set torch._functorch.config.donated_buffer = False before the model runs "
            "for the first time (after torch.compiler.reset(), if it has run)."
        ) from error


def _hand_over(number: int, leaf: Tensor, receive: Receive) -> Callable[[Tensor | None], Tensor | None]:
    def hook(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        receive(number, [leaf], [gradient])
        # autograd holds what it will return until the pass is over: this takes no memory.
        return None if gradient.is_sparse else gradient.new_empty(()).expand(gradient.shape)

    return hook
