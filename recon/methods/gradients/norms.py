"""How long each task's gradient is in one layer: a short backward pass for each task, which leaves the graph whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recon.errors import NonFiniteError, UsageError
from recon.methods.bases.method import WHAT_TO_LOOK_AT
from recon.methods.gradients.held import held
from recon.methods.gradients.passes import several_passes
from recon.methods.gradients.reach import Reach, find_reach
from recon.methods.gradients.sparse import average_gradients, entries
from recon.support.network.graph import last_uses, used_at_once
from recon.support.network.layers import Layer, canonical_name, find_layers, unwrapped
from recon.support.processes import gather, world_size


def layer_norms(losses: Mapping[str, Tensor], model: nn.Module, name: str = "") -> dict[str, Tensor]:
    """The norm of each loss's gradient with respect to the parameters of one layer; the losses' graph is kept.

    Where several processes train together, the gradients are averaged over the ranks first, as everywhere.

    Without a name, the layer is the last one that all tasks of the step share: the one that the forward pass used last.
    A copy in a branched layer that serves some of the tasks is not shared by all.

    Returns `{task: norm}`, 0-dimensional, in float64 where the device has it, for the tasks that any rank has; empty if
    there is only one, which cannot be compared with anything.
    """
    layers = find_layers(unwrapped(model))
    name = name and canonical_name(layers, name)
    parameters = [p for layer in layers for p in layer.parameters.values()]
    reach = find_reach(losses, parameters)
    if len(reach.tasks) < 2:
        return {}
    reached = {task: set(found) for task, found in reach.parameters.items()}
    layer = _named(layers, name, reached) if name else _last_shared(layers, losses, reached)
    parameters = [p for p in layer.parameters.values() if p.requires_grad]
    with _untouched(list(model.buffers())):
        norms = {task: _norm(losses.get(task), parameters, reach) for task in reach.tasks}
    finite = torch.stack(list(norms.values())).isfinite().tolist()
    bad = [task for task, good in zip(norms, finite, strict=True) if not good]
    if bad:
        raise NonFiniteError(
            f"The gradients of the tasks {bad} are not finite in layer {layer.name!r}, so their norms say nothing. "
            f"{WHAT_TO_LOOK_AT}"
        )
    return norms


def _named(layers: Sequence[Layer], name: str, reached: Mapping[str, set[nn.Parameter]]) -> Layer:
    layer = next(layer for layer in layers if layer.name == name)
    without = [task for task, found in reached.items() if found.isdisjoint(layer.parameters.values())]
    if without:
        raise UsageError(
            f"The losses of {without} have no gradient in layer {name!r}, so the tasks cannot be compared there. Name "
            "a trainable layer that all tasks share, or leave the layer out to use the last such layer."
        )
    return layer


def _last_shared(
    layers: Sequence[Layer], losses: Mapping[str, Tensor], reached: Mapping[str, set[nn.Parameter]]
) -> Layer:
    everywhere = set.intersection(*reached.values())
    shared = [layer for layer in layers if not everywhere.isdisjoint(layer.parameters.values())]
    if not shared:
        raise UsageError(
            f"No layer is shared by all of the tasks {list(reached)}, so there is none to compare them in. Use a "
            "weighting that needs the losses alone."
        )
    uses, at_once = _order_of_use(losses.values())
    mine = [
        (max(uses.get(p, -1) for p in layer.parameters.values()), not at_once.isdisjoint(layer.parameters.values()))
        for layer in shared
    ]
    # Every rank must choose the same one, and one that lacks a task has no whole graph to look at.
    last_use, compiled = zip(*map(max, zip(*gather(mine), strict=True)), strict=True)
    last = [number for number, use in enumerate(last_use) if use == max(last_use)]
    if len(last) > 1 and any(compiled[number] for number in last):
        raise UsageError(
            "Which of the shared layers a compiled model uses last cannot be seen from outside. Name the one to "
            f"compare the tasks in, layer={shared[last[-1]].name!r} say (gradnorm:layer={shared[last[-1]].name})."
        )
    return shared[last[-1]]  # of layers that one operation uses, the last in model order


def _order_of_use(losses: Iterable[Tensor]) -> tuple[dict[Tensor, int], set[Tensor]]:
    """When the leaves were used last, and those that a compiled part uses."""
    losses = list(losses)
    known = [found for loss in losses if (found := held(loss)) is not None]
    if not known:
        return last_uses(losses), used_at_once(losses)
    uses: dict[Tensor, int] = {}
    for found in known:
        uses = {leaf: max(uses.get(leaf, -1), found.uses.get(leaf, -1)) for leaf in (uses | found.uses)}
    return uses, set().union(*(found.at_once for found in known))


def _norm(loss: Tensor | None, parameters: Sequence[nn.Parameter], reach: Reach) -> Tensor:
    found: Sequence[Tensor | None] = [None] * len(parameters)
    known = None if loss is None else held(loss)
    if known is not None:
        found = [known.gradients.get(p) for p in parameters]
    elif loss is not None:
        with several_passes():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    gradients = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
    if world_size() > 1:
        own = {p: gradients[p].to(p.dtype, copy=True) if p in gradients else reach.nothing(p) for p in parameters}
        gradients = average_gradients(own)
    # Squared norms of float32 gradients leave float32 at norms of 1e-23 and 1e19.
    dtype = torch.float32 if parameters[0].device.type == "mps" else torch.float64
    numbers = [entries(gradient).to(dtype).flatten() for gradient in gradients.values()]
    return torch.linalg.vector_norm(torch.cat(numbers or [parameters[0].new_zeros(1, dtype=dtype)]))


@contextmanager
def _untouched(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Put the buffers back: a pass that runs a part of the forward again (activation checkpoints) moves statistics."""
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        # BatchNorm's counter shows that it was moved; its running mean and variance do not.
        if any(buffer._version != version for buffer, version, _ in kept):
            with torch.no_grad():
                for buffer, _, values in kept:
                    buffer.copy_(values)
