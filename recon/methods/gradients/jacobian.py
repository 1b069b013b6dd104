"""TaskJacobian: the task gradients of a step, and how they are written into `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.methods.gradients.passes import differentiate
from recon.methods.gradients.reach import Reach, find_reach
from recon.support.processes import average_, world_size

_PIECE = 1 << 17  # scalars of an update that are made at a time, or one parameter's


@dataclass
class TaskJacobian:
    """The task gradients of one step: J, one row a task that had a loss in it.

    Its columns belong to the shared parameters, which two tasks or more reach, one after the other; complex numbers
    take two. It is zero where a task does not reach. `own` is `{task: {leaf: gradient}}` for the parameters that one
    task alone reaches, and for leaves that are no parameters of the model.
    """

    tasks: tuple[str, ...]
    shared: list[nn.Parameter]
    matrix: Tensor  # (T, P), float32 at least
    own: dict[str, dict[Tensor, Tensor]]


class Workspace:
    """Memory for a step's Jacobian that the next step uses again: new pages cost as much as the statistics."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._layout: tuple[int, ...] = ()
        self._rows: list[dict[Tensor, Tensor]] = []

    def matrix(self, shared: Sequence[nn.Parameter], tasks: int) -> tuple[Tensor, list[dict[Tensor, Tensor]]]:
        """A (T, P) matrix with whatever the last step left in it, and each row as `{parameter: its part, shaped}`."""
        layout = (tasks, *map(id, shared))
        widths = list(map(width, shared))
        columns = sum(widths)
        if layout != self._layout:
            matrix = self._resize(shared, tasks, columns)
            shapes = [as_real(p).shape for p in shared]
            self._rows = [
                {p: part.view(shape) for p, part, shape in zip(shared, row.split(widths), shapes, strict=True)}
                for row in matrix
            ]
            self._layout = layout
        return self._memory[: tasks * columns].view(tasks, columns), self._rows

    def _resize(self, shared: Sequence[nn.Parameter], tasks: int, columns: int) -> Tensor:
        dtype = torch.float32
        for p in shared:
            dtype = torch.promote_types(dtype, p.dtype.to_real())
        device = shared[0].device if shared else torch.device("cpu")
        if self._memory.numel() < tasks * columns or (self._memory.dtype, self._memory.device) != (dtype, device):
            self._rows, self._memory = [], torch.empty(0)  # before more is taken
            self._memory = torch.empty(tasks * columns, dtype=dtype, device=device)
        return self._memory[: tasks * columns].view(tasks, columns)


def task_jacobian(
    losses: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    workspace: Workspace | None = None,
    buffers: Iterable[Tensor] = (),
) -> TaskJacobian:
    """Differentiate each task's loss with respect to the parameters it reaches; frees the graph.

    `shared` follows the order of `parameters`. Where several processes train together, the gradients are the means
    over the ranks, and the tasks those that any rank has. In a workspace, the matrix holds until the next call.
    """
    parameters = list(parameters)
    reach = find_reach(losses, parameters)
    jacobian = _fill(losses, reach, workspace or Workspace(), buffers)
    if world_size() > 1:
        _average(jacobian, reach)
    return jacobian


def _fill(losses: Mapping[str, Tensor], reach: Reach, workspace: Workspace, buffers: Iterable[Tensor]) -> TaskJacobian:
    matrix, rows = workspace.matrix(reach.shared, len(reach.tasks))
    unreached = [dict(row) for row in rows]
    own: list[dict[Tensor, Tensor]] = [{} for _ in rows]

    def receive(number: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        left, places, parts = unreached[number], [], []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            place = left.pop(leaf, None)
            if place is None:
                own[number][leaf] = gradient.clone()
            else:
                places.append(place)
                parts.append(as_real(gradient))
        if places:
            torch._foreach_copy_(places, parts)

    differentiate(losses, reach, buffers, receive)
    for left in unreached:
        for place in left.values():
            place.zero_()
    return TaskJacobian(reach.tasks, reach.shared, matrix, dict(zip(reach.tasks, own, strict=True)))


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
    """A complex gradient as pairs of real numbers, so that inner products are those of real gradient descent."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def write_combination(jacobian: TaskJacobian, weights: Tensor | None = None) -> None:
    """Accumulate `weights @ J` into the shared parameters' `.grad`: the plain sum of the rows without weights (T,)."""
    weights = None if weights is None else weights.to(jacobian.matrix)
    start = 0
    for parameters in _pieces(jacobian.shared):
        stop = start + sum(map(width, parameters))
        rows = jacobian.matrix[:, start:stop]
        _write(parameters, _sum(rows) if weights is None else weights @ rows)
        start = stop


def _sum(rows: Tensor) -> Tensor:
    """Of all rows; `sum()` takes twice as long on a CPU."""
    if len(rows) == 2:
        return rows[0] + rows[1]
    return rows.new_ones(len(rows)) @ rows if rows.device.type == "cpu" else rows.sum(dim=0)


def _pieces(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """A large parameter alone, small ones together: memory for all at once would be new pages in every step."""
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        piece.append(parameter)
        size += width(parameter)
        if size > _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def write_update(jacobian: TaskJacobian, update: Tensor) -> None:
    """Accumulate a (P,) update of the shared parameters into their `.grad`."""
    _write(jacobian.shared, update)


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], update: Tensor) -> None:
    for parameter, part in zip(parameters, update.split(list(map(width, parameters))), strict=True):
        if parameter.is_complex():
            part = torch.view_as_complex(part.view(*parameter.shape, 2))
        _accumulate(parameter, part.view(parameter.shape))


def write_own(jacobian: TaskJacobian, weights: Mapping[str, Tensor] | None = None) -> None:
    """Accumulate the gradients that belong to one task alone, times the task's weight if given."""
    for task, gradients in jacobian.own.items():
        for leaf, gradient in gradients.items():
            add_gradient(leaf, gradient if weights is None else gradient * weights[task].to(gradient))


@torch.no_grad()
def add_gradient(leaf: Tensor, gradient: Tensor) -> None:
    """Accumulate into `.grad` as `backward()` would, in place, and run its hooks; may change `gradient`."""
    _accumulate(leaf, gradient)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    grad = leaf.grad
    if grad is None:
        if gradient.dtype != leaf.dtype or gradient.device != leaf.device or gradient.stride() != leaf.stride():
            # Optimizers are quicker where the gradient lies in memory as its parameter does.
            gradient = torch.empty_like(leaf).copy_(gradient)
        leaf.grad = gradient
    elif grad.is_sparse:
        leaf.grad = grad + gradient
    else:
        grad.add_(gradient.to(grad.device))
    for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(leaf)
