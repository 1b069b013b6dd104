"""Per-task gradients, and their Gramians layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recon.errors import GradientError, UsageError

_CHUNK = 1 << 18  # float64 numbers held at a time: they stay in a CPU's cache


@dataclass
class TaskJacobian:
    """The task gradients of one step: J, one row a task, kept parameter by parameter.

    Args:
        tasks: the tasks that had a loss in this step (T of them).
        shared: the parameters that two or more of the losses depend on.
        rows: `rows[t][i]`, the gradient of task t with respect to shared parameter i; `None` if it has none.
        own: `{task: {parameter: gradient}}` for the parameters that one task alone reaches.
    """

    tasks: tuple[str, ...]
    shared: list[nn.Parameter]
    rows: list[list[Tensor | None]]
    own: dict[str, dict[nn.Parameter, Tensor]]

    def matrix(self) -> Tensor:
        """J as one (T, P) matrix, zero where a task does not reach; float32 at least."""
        dtype = torch.float32
        for p in self.shared:
            dtype = torch.promote_types(dtype, p.dtype)
        flat = [
            [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(self.shared, row, strict=True)]
            for row in self.rows
        ]
        return torch.stack([torch.cat(row).to(dtype) for row in flat])


def task_jacobian(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> TaskJacobian:
    """Differentiate each task's loss with respect to the parameters it reaches; frees the graph.

    `shared` follows the order of `parameters`.

    Raises:
        GradientError: a loss does not depend on any of the parameters.
        UsageError: several processes train together.
    """
    _refuse_several_processes()
    trainable = [p for p in parameters if p.requires_grad]
    reach = {task: _reached_of(task, loss, trainable) for task, loss in losses.items()}
    shared = [p for p in trainable if sum(p in reached for reached in reach.values()) > 1]
    shared_set = set(shared)
    last = list(losses)[-1] if losses else None
    rows: list[list[Tensor | None]] = []
    own: dict[str, dict[nn.Parameter, Tensor]] = {}
    for task, loss in losses.items():
        mine = [p for p in trainable if p in reach[task]]
        # Only the last backward may free the graph: the tasks share its trunk.
        found = torch.autograd.grad(loss, mine, retain_graph=task != last, allow_unused=True)
        gradients = {p: g.to_dense() if g.is_sparse else g for p, g in zip(mine, found, strict=True) if g is not None}
        own[task] = {p: g for p, g in gradients.items() if p not in shared_set}
        rows.append([gradients.get(p) for p in shared])
    return TaskJacobian(tuple(losses), shared, rows, own)


def _refuse_several_processes() -> None:
    # DistributedDataParallel reduces what backward() accumulates, and never sees these gradients.
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError(
            f"{dist.get_world_size()} processes train together, but gradients of single tasks are not reduced across "
            "processes: every one would go its own way. Profile, and train with methods that work on task gradients, "
            "in one process; `joint` and other weightings of the losses train under DistributedDataParallel."
        )


def _reached_of(task: str, loss: Tensor, trainable: Sequence[nn.Parameter]) -> set[Tensor]:
    reached = reached_leaves([loss]).intersection(trainable)
    if not reached:
        raise GradientError(
            f"The loss of task {task!r} depends on no trainable parameter of the model, so it has no gradient. "
            "Check that it uses the model's output for this task, without detach() or no_grad(), and that not "
            "all of its layers are frozen."
        )
    return reached


def reached_leaves(values: Sequence[Tensor]) -> set[Tensor]:
    """The leaf tensors that `values` depend on, read off the autograd graph without computing anything."""
    leaves = {v for v in values if v.grad_fn is None and v.requires_grad}
    seen = set()
    stack = [v.grad_fn for v in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack += [next_node for next_node, _ in node.next_functions]
    return leaves


def gramian(jacobian: TaskJacobian) -> Tensor:
    """J Jᵀ in float64, (T, T)."""
    _, gramians = layer_gramians(jacobian, {p: number for number, p in enumerate(jacobian.shared)})
    return gramians.sum(dim=0)


def layer_gramians(jacobian: TaskJacobian, layer_of: Mapping[nn.Parameter, int]) -> tuple[list[int], Tensor]:
    """The Gramian G_k = J_k J_kᵀ of every shared layer, weight and bias together: one product, no loop over pairs.

    In float64, for cosines that are exact and independent of the loss scale: squares of gradients near 1e-25
    vanish in float32, and a float32 sum over a million elements is off by 1e-5. (Apple's MPS has no float64.)

    Args:
        jacobian: its shared parameters must come layer by layer.
        layer_of: the number of each parameter's layer.

    Returns:
        The L layers' numbers, and (L, T, T), zero where a task does not reach.
    """
    count = len(jacobian.tasks)
    columns = [
        (p, column)
        for p, column in zip(jacobian.shared, zip(*jacobian.rows, strict=True), strict=True)
        if any(g is not None for g in column)
    ]
    by_layer = groupby(columns, key=lambda column: layer_of[column[0]])
    members = {layer: [column for _, column in group] for layer, group in by_layer}
    gramians: list[Tensor] = []
    for layers in _batches(members.values(), max(1, _CHUNK // max(1, count))):
        gramians += _gramians(layers)
    return list(members), torch.stack(gramians) if gramians else torch.zeros(0, count, count, dtype=torch.float64)


Column = tuple["Tensor | None", ...]
"""One parameter's gradient by task."""


def _batches(layers: Iterable[list[Column]], room: int) -> Iterator[list[list[Column]]]:
    """Small layers together, as many as fit into `room` columns; a larger one alone."""
    batch: list[list[Column]] = []
    used = 0
    for layer in layers:
        size = sum(map(_size, layer))
        if batch and used + size > room:
            yield batch
            batch, used = [], 0
        batch.append(layer)
        used += size
    if batch:
        yield batch


def _gramians(layers: list[list[Column]]) -> list[Tensor]:
    """The Gramians of some layers, from all their gradients in one block; a large layer's in pieces."""
    rows = [[_flat(column, t) for layer in layers for column in layer] for t in range(len(layers[0][0]))]
    sizes = [sum(map(_size, layer)) for layer in layers]
    if len(layers) > 1:
        block = torch.stack([torch.cat(row) for row in rows])
        return [_self_product(part) for part in block.to(_wide_dtype(block)).split(sizes, dim=1)]
    return [_gramian_in_pieces(rows, max(1, _CHUNK // len(rows)))]


def _gramian_in_pieces(rows: list[list[Tensor]], length: int) -> Tensor:
    first = rows[0][0]
    wide = torch.empty(len(rows), length, dtype=_wide_dtype(first), device=first.device)
    products = []
    for column in zip(*rows, strict=True):
        for parts in zip(*(g.split(length) for g in column), strict=True):
            block = wide[:, : len(parts[0])]
            for row, part in zip(block, parts, strict=True):
                row.copy_(part)  # converts
            products.append(_self_product(block))
    return torch.stack(products).sum(dim=0)


def _size(column: Column) -> int:
    return max((g.numel() for g in column if g is not None), default=0)


def _flat(column: Column, task: int) -> Tensor:
    gradient = column[task]
    if gradient is not None:
        return gradient.reshape(-1)
    some = next(g for g in column if g is not None)
    return some.new_zeros(some.numel())


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _self_product(block: Tensor) -> Tensor:
    """`block @ block.T`, (T, T)."""
    rows = block.unbind()
    if len(rows) > 3 or block.device.type != "cpu":
        with torch.autocast(block.device.type, enabled=False):
            return block @ block.T
    # On a CPU, a product as flat as this takes BLAS twice as long as the dot products that it is made of.
    count = len(rows)
    dots = {(i, j): torch.dot(rows[i], rows[j]) for i in range(count) for j in range(i + 1)}
    return torch.stack([dots[max(i, j), min(i, j)] for i in range(count) for j in range(count)]).view(count, count)


def write_combination(jacobian: TaskJacobian, weights: Tensor | None = None) -> None:
    """Accumulate `weights @ J` into the shared parameters' `.grad`; the rows are spent.

    Args:
        jacobian: of this step.
        weights: (T,); the plain sum of the rows when not given.
    """
    for i, parameter in enumerate(jacobian.shared):
        terms = [(row[i], t) for t, row in enumerate(jacobian.rows)]
        # Each gradient is let go once it is used, so that the next sum can take its memory.
        for row in jacobian.rows:
            row[i] = None
        total = _combine([(g, t) for g, t in terms if g is not None], weights)
        if total is not None:
            add_gradient(parameter, total)


def _combine(terms: Sequence[tuple[Tensor, int]], weights: Tensor | None) -> Tensor | None:
    """A sum that is nobody else's: what autograd hands out may share memory with other tensors."""
    if not terms:
        return None
    (first, t), *rest = terms
    if weights is not None:
        total = first * weights[t].to(first)
        for gradient, t in rest:
            total.addcmul_(gradient, weights[t].to(gradient))
        return total
    if not rest:
        return first.clone()
    total = first + rest[0][0]
    for gradient, _ in rest[1:]:
        total.add_(gradient)
    return total


def write_update(jacobian: TaskJacobian, update: Tensor) -> None:
    """Accumulate a (P,) update of the shared parameters into their `.grad`."""
    sizes = [p.numel() for p in jacobian.shared]
    for parameter, part in zip(jacobian.shared, update.split(sizes), strict=True):
        add_gradient(parameter, part.view(parameter.shape))


def write_own(jacobian: TaskJacobian, weights: Mapping[str, Tensor] | None = None) -> None:
    """Accumulate the gradients of the parameters that one task alone reaches, times the task's weight if given."""
    for task, gradients in jacobian.own.items():
        for parameter, gradient in gradients.items():
            own = gradient.clone() if weights is None else gradient * weights[task].to(gradient)
            add_gradient(parameter, own)


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Accumulate into `.grad`, as `backward()` would; `gradient` must be nobody else's."""
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
