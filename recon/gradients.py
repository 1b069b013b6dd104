"""Per-task gradients, and their Gramians layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from recon.errors import GradientError

_CHUNK = 1 << 17  # elements converted to float64 at a time: they stay in a CPU's cache


@dataclass
class TaskJacobian:
    """The task gradients of one step.

    Args:
        tasks: the tasks that had a loss in this step (T of them).
        matrix: (T, P), one row a task: the gradients of the parameters that two or more tasks reach.
        shared: those parameters, in the order of the columns.
        reached: (T, number of shared parameters), whether the task's loss depends on the parameter; the
            row is zero where it does not.
        own: `{parameter: gradient}` for the parameters that one task alone reaches, by task.
    """

    tasks: tuple[str, ...]
    matrix: Tensor
    shared: list[nn.Parameter]
    reached: Tensor
    own: dict[str, dict[nn.Parameter, Tensor]]


def task_jacobian(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> TaskJacobian:
    """Differentiate each task's loss with respect to the parameters it reaches; frees the graph.

    Columns follow the order of `parameters`. Rows of half-precision gradients are kept in float32.

    Raises:
        GradientError: a loss does not depend on any of the parameters.
    """
    tasks = tuple(losses)
    trainable = [p for p in parameters if p.requires_grad]
    reach = {task: _reached_of(task, loss, trainable) for task, loss in losses.items()}
    shared = [p for p in trainable if sum(p in reach[task] for task in tasks) > 1]
    matrix, reached = _empty_jacobian(shared, len(tasks))
    own: dict[str, dict[nn.Parameter, Tensor]] = {}
    shared_set = set(shared)
    for row, task in enumerate(tasks):
        mine = [p for p in trainable if p in reach[task]]
        # Only the last backward may free the graph: the tasks share its trunk.
        gradients = torch.autograd.grad(losses[task], mine, retain_graph=row < len(tasks) - 1, allow_unused=True)
        found = {p: g for p, g in zip(mine, gradients, strict=True) if g is not None}
        own[task] = {p: g for p, g in found.items() if p not in shared_set}
        _fill_row(matrix[row], reached[row], shared, found)
    return TaskJacobian(tasks, matrix, shared, reached.to(matrix.device, non_blocking=True), own)


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


def _empty_jacobian(shared: Sequence[nn.Parameter], rows: int) -> tuple[Tensor, Tensor]:
    columns = sum(p.numel() for p in shared)
    dtype = torch.float32
    for p in shared:
        dtype = torch.promote_types(dtype, p.dtype)
    device = shared[0].device if shared else None
    reached = torch.zeros(rows, len(shared), dtype=torch.bool)
    return torch.empty(rows, columns, dtype=dtype, device=device), reached


def _fill_row(
    row: Tensor, reached: Tensor, shared: Sequence[nn.Parameter], found: Mapping[nn.Parameter, Tensor]
) -> None:
    start = 0
    for column, p in enumerate(shared):
        part = row[start : start + p.numel()]
        start += p.numel()
        if p in found:
            reached[column] = True
            part.view(p.shape).copy_(found[p])
        else:
            part.zero_()


def gramian(block: Tensor) -> Tensor:
    """`block @ block.T` in float64, (T, T), for a (T, n) block of task gradients.

    float64 keeps cosines exact and independent of the loss scale: squares of gradients near 1e-25 vanish
    in float32. Apple's MPS has no float64 and gets float32.
    """
    dtype = torch.float32 if block.device.type == "mps" else torch.float64
    total = torch.zeros(len(block), len(block), dtype=dtype, device=block.device)
    with torch.autocast(block.device.type, enabled=False):
        for chunk in block.split(max(1, _CHUNK // max(1, len(block))), dim=1):
            wide = chunk.to(dtype)
            total.addmm_(wide, wide.T)
    return total


def layer_gramians(jacobian: TaskJacobian, layer_of: Mapping[nn.Parameter, int]) -> tuple[list[int], Tensor, Tensor]:
    """The Gramian G_k = J_k J_kᵀ of every shared layer: weight and bias together, one product per layer.

    Args:
        jacobian: its shared parameters must come layer by layer.
        layer_of: the number of each parameter's layer.

    Returns:
        The L layers' numbers; their Gramians (L, T, T); and (L, T), which tasks reach each layer.
    """
    layers, gramians, reached = [], [], []
    column = start = 0
    for layer, parameters in groupby(jacobian.shared, key=layer_of.__getitem__):
        sizes = [p.numel() for p in parameters]
        stop = start + sum(sizes)
        layers.append(layer)
        gramians.append(gramian(jacobian.matrix[:, start:stop]))
        reached.append(jacobian.reached[:, column : column + len(sizes)].any(dim=1))
        start, column = stop, column + len(sizes)
    return layers, torch.stack(gramians), torch.stack(reached)


def cosines_of(gramians: Tensor) -> Tensor:
    """(L, T, T) cosines of the angles between task gradients, from their Gramians; NaN for a zero gradient."""
    norms = gramians.diagonal(dim1=-2, dim2=-1).sqrt()
    return gramians / (norms.unsqueeze(-1) * norms.unsqueeze(-2))


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Accumulate into `.grad`, as `backward()` would."""
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def write_update(jacobian: TaskJacobian, update: Tensor) -> None:
    """Accumulate a (P,) update of the shared parameters into their `.grad`."""
    start = 0
    for p in jacobian.shared:
        add_gradient(p, update[start : start + p.numel()].view(p.shape))
        start += p.numel()
