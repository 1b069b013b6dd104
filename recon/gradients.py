"""TaskJacobian: the task gradients of a step, and what becomes of them in `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.backward_passes import differentiate
from recon.distributed import agree_on_reach, average_, world_size
from recon.reach import Reach, find_reach


@dataclass
class TaskJacobian:
    """The task gradients of one step: J, one row a task.

    Args:
        tasks: the tasks that had a loss in this step (T of them).
        shared: the parameters that the columns belong to, one after the other: those that two tasks or more reach.
        matrix: (T, P), zero where a task does not reach; float32 at least. Complex numbers take two columns.
        own: `{task: {leaf: gradient}}` for the parameters that one task alone reaches, and for leaves that are no
            parameters of the model.
    """

    tasks: tuple[str, ...]
    shared: list[nn.Parameter]
    matrix: Tensor
    own: dict[str, dict[Tensor, Tensor]]


class Workspace:
    """Memory for a step's Jacobian that the next step uses again: new pages cost as much as the statistics."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, columns), with whatever the last step left in it."""
        kept = self._memory
        if kept is None or kept.numel() < rows * columns or (kept.dtype, kept.device) != (dtype, device):
            self._memory = kept = None  # before more is taken
            self._memory = kept = torch.empty(rows * columns, dtype=dtype, device=device)
        return kept[: rows * columns].view(rows, columns)


def task_jacobian(
    losses: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    workspace: Workspace | None = None,
    buffers: Iterable[Tensor] = (),
) -> TaskJacobian:
    """Differentiate each task's loss with respect to the parameters it reaches; frees the graph.

    `shared` follows the order of `parameters`. Where several processes train together, the gradients are the means
    over the ranks, and the tasks those that any rank has.

    Args:
        losses: `{task: scalar loss}`.
        parameters: those to differentiate.
        workspace: where to put the matrix, which then holds until the next call.
        buffers: the model's, see `recon.backward_passes`.

    Raises:
        GradientError: a loss does not depend on any of the parameters.
    """
    parameters = list(parameters)
    reach = agree_on_reach(find_reach(losses, parameters), parameters)
    jacobian = _empty(reach, workspace or Workspace())
    _fill(jacobian, losses, reach, buffers)
    if world_size() > 1:
        _average(jacobian, reach)
    return jacobian


def _empty(reach: Reach, workspace: Workspace) -> TaskJacobian:
    """A Jacobian whose matrix holds anything."""
    dtype, device = torch.float32, torch.device("cpu")
    for p in reach.shared:
        dtype = torch.promote_types(dtype, p.dtype.to_real())
    for p in reach.shared[:1]:
        device = p.device
    matrix = workspace.matrix(len(reach.tasks), sum(map(width, reach.shared)), dtype, device)
    return TaskJacobian(reach.tasks, reach.shared, matrix, {task: {} for task in reach.tasks})


def _fill(jacobian: TaskJacobian, losses: Mapping[str, Tensor], reach: Reach, buffers: Iterable[Tensor]) -> None:
    widths = list(map(width, jacobian.shared))
    rows: list[dict[Tensor, Tensor]]
    rows = [dict(zip(jacobian.shared, row.split(widths), strict=True)) for row in jacobian.matrix]

    def receive(number: int, leaf: Tensor, gradient: Tensor) -> None:
        place = rows[number].pop(leaf, None)
        if place is None:
            jacobian.own[jacobian.tasks[number]][leaf] = gradient.clone()
        else:
            real = as_real(gradient)
            place.view(real.shape).copy_(real)

    differentiate(losses, reach, buffers, receive)
    for row in rows:
        for unreached in row.values():
            unreached.zero_()


def _average(jacobian: TaskJacobian, reach: Reach) -> None:
    """Over the ranks, all of which must bring the same gradients in the same order."""
    shared = set(jacobian.shared)
    own = [
        jacobian.own[task].setdefault(parameter, torch.zeros_like(parameter))
        for task, reached in reach.parameters.items()
        for parameter in reached
        if parameter not in shared
    ]
    average_([jacobian.matrix, *own])


def width(leaf: Tensor) -> int:
    """The columns that a leaf takes in a Jacobian."""
    return leaf.numel() * (2 if leaf.is_complex() else 1)


def as_real(gradient: Tensor) -> Tensor:
    """A complex gradient as pairs of real numbers, whose inner products are those that descent goes by."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def write_combination(jacobian: TaskJacobian, weights: Tensor | None = None) -> None:
    """Accumulate `weights @ J` into the shared parameters' `.grad`.

    Args:
        jacobian: of this step.
        weights: (T,); the plain sum of the rows when not given.
    """
    matrix = jacobian.matrix
    write_update(jacobian, matrix.sum(dim=0) if weights is None else weights.to(matrix) @ matrix)


def write_update(jacobian: TaskJacobian, update: Tensor) -> None:
    """Accumulate a (P,) update of the shared parameters into their `.grad`."""
    widths = list(map(width, jacobian.shared))
    for parameter, part in zip(jacobian.shared, update.split(widths), strict=True):
        if parameter.is_complex():
            part = torch.view_as_complex(part.view(*parameter.shape, 2))
        add_gradient(parameter, part.view(parameter.shape))


def write_own(jacobian: TaskJacobian, weights: Mapping[str, Tensor] | None = None) -> None:
    """Accumulate the gradients that belong to one task alone, times the task's weight if given."""
    for task, gradients in jacobian.own.items():
        for leaf, gradient in gradients.items():
            add_gradient(leaf, gradient if weights is None else gradient * weights[task].to(gradient))


@torch.no_grad()
def add_gradient(leaf: Tensor, gradient: Tensor) -> None:
    """Accumulate into `.grad` as `backward()` would, in place, and run what waits for it; `gradient` is spent."""
    if leaf.grad is None:
        gradient = gradient.to(device=leaf.device, dtype=leaf.dtype)
        # Optimizers are quicker where the gradient lies in memory as its parameter does.
        leaf.grad = gradient if gradient.stride() == leaf.stride() else torch.empty_like(leaf).copy_(gradient)
    elif leaf.grad.is_sparse:
        leaf.grad = leaf.grad + gradient
    else:
        leaf.grad.add_(gradient.to(leaf.grad.device))
    for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(leaf)
