"""TaskJacobian: the task gradients of a step, and how they are written into `.grad`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from recon.methods.gradients.held import HeldGradients, held
from recon.methods.gradients.passes import differentiate
from recon.methods.gradients.reach import Reach, find_reach
from recon.methods.gradients.sparse import add, average_gradients, from_rows, touched_rows
from recon.support.network.tensors import as_real
from recon.support.processes import world_size

_PIECE = 1 << 17  # scalars of an update that are made at a time, or one parameter's


@dataclass
class TaskJacobian:
    """The task gradients of one step: J, one row a task that had a loss in it.

    Its columns belong to the shared parameters, which two tasks or more reach, one after the other; complex numbers
    take two. It is zero where a task does not reach. `own` is `{task: {leaf: gradient}}` for the parameters that one
    task alone reaches, and for leaves that are no parameters of the model.

    `rows` is `{table: indices}` for the shared parameters with sparse gradients (`nn.Embedding(sparse=True)`), which
    come last among the shared. Such a table has columns for the rows that any of the tasks touched in this step alone,
    those at the (d, n) indices of a COO tensor, in rising order: all other columns would be zero. They are other
    columns in every step; `recon.methods.gradients.sparse.meeting` finds those that two steps have in common.
    """

    tasks: tuple[str, ...]
    shared: list[nn.Parameter]
    matrix: Tensor  # (T, P), float32 at least; its rows need not follow each other in memory
    own: dict[str, dict[Tensor, Tensor]]
    rows: Mapping[Tensor, Tensor] = field(default_factory=dict)

    def width(self, parameter: Tensor) -> int:
        """The columns that a shared parameter takes."""
        rows = self.rows.get(parameter) if self.rows else None
        return width(parameter) if rows is None else rows.shape[1] * math.prod(as_real(parameter).shape[len(rows) :])


class Workspace:
    """Memory for a step's Jacobian that the next step uses again: new pages cost as much as the statistics.

    A step that goes task by task may write each task's gradients to where the last step had them (`lend`). Where they
    turn out to belong elsewhere, they are moved.
    """

    def __init__(self) -> None:
        self._lent: WeakValueDictionary[int, HeldGradients] = WeakValueDictionary()  # by row
        self._memory = torch.empty(0)
        self._layout: tuple[int, ...] = ()
        self._rows: list[dict[Tensor, Tensor]] = []
        self._room = 0  # columns for what is touched of tables: other ones in every step

    def lend(self, row: int, found: HeldGradients) -> Mapping[Tensor, Tensor]:
        """Where a task's gradients of the next step would lie, `{parameter: its part, shaped}`; `found` gets them."""
        if row in self._lent or row >= len(self._rows):
            return {}
        self._lent[row] = found
        return self._rows[row]

    def matrix(
        self,
        shared: Sequence[nn.Parameter],
        tasks: int,
        tables: Sequence[nn.Parameter] = (),
        rows: Sequence[HeldGradients | None] = (),
    ) -> tuple[Tensor, list[dict[Tensor, Tensor]]]:
        """A (T, P) matrix with whatever the last step left in it, and each row as `{parameter: its part, shaped}`.

        The tables have no columns in it: `widened` adds those of their rows that were touched, once they are known.
        `rows` are the held gradients that will be written to the rows.
        """
        layout = (tasks, *map(id, shared), 0, *map(id, tables))
        widths = list(map(width, shared))
        belong = dict(enumerate(rows)) if layout == self._layout else {}
        for row, found in self._lent.items():
            if belong.get(row) is not found:
                found.move_out()
        self._lent.clear()
        if layout != self._layout:
            matrix = self._resize([*shared, *tables], tasks, sum(widths))
            shapes = [as_real(p).shape for p in shared]
            self._rows = [
                {p: part.view(shape) for p, part, shape in zip(shared, row.split(widths), shapes, strict=True)}
                for row in matrix
            ]
            self._layout = layout
        return self._view(tasks, sum(widths), self._room), self._rows

    def widened(self, matrix: Tensor, columns: int) -> Tensor:
        """(T, P + columns): the present matrix with more columns behind, with whatever is in them."""
        tasks, before = matrix.shape
        if columns > self._room:
            self._room = columns + columns // 4
            self._layout, self._rows = (), []  # the next step's lie elsewhere
            self._memory = matrix.new_empty(tasks * (before + self._room))
            self._view(tasks, before, self._room).copy_(matrix)
        return self._view(tasks, before + columns, self._room - columns)

    def _view(self, tasks: int, columns: int, room: int) -> Tensor:
        return self._memory[: tasks * (columns + room)].view(tasks, columns + room)[:, :columns]

    def _resize(self, parameters: Sequence[nn.Parameter], tasks: int, columns: int) -> Tensor:
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype.to_real())
        device = parameters[0].device if parameters else torch.device("cpu")
        size = tasks * (columns + self._room)
        if self._memory.numel() < size or (self._memory.dtype, self._memory.device) != (dtype, device):
            self._rows, self._memory = [], torch.empty(0)  # before more is taken
            self._memory = torch.empty(size, dtype=dtype, device=device)
        return self._view(tasks, columns, self._room)


def task_jacobian(
    losses: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    workspace: Workspace | None = None,
    buffers: Iterable[Tensor] = (),
) -> TaskJacobian:
    """Differentiate each task's loss with respect to the parameters it reaches; frees the graph.

    `shared` follows the order of `parameters`, with tables that got sparse gradients behind the others. Where several
    processes train together, the gradients are the means over the ranks, and the tasks those that any rank has. In a
    workspace, the matrix holds until the next call.
    """
    parameters = list(parameters)
    reach = find_reach(losses, parameters)
    jacobian = _fill(losses, reach, workspace or Workspace(), buffers)
    if world_size() > 1:
        _average(jacobian, reach)
    return jacobian


def _fill(losses: Mapping[str, Tensor], reach: Reach, workspace: Workspace, buffers: Iterable[Tensor]) -> TaskJacobian:
    plain = [p for p in reach.shared if p not in reach.tables]
    tables = [p for p in reach.shared if p in reach.tables]
    by_row = [None if task not in losses else held(losses[task]) for task in reach.tasks]
    matrix, rows = workspace.matrix(plain, len(reach.tasks), tables, by_row)
    unreached = [dict(row) for row in rows]
    own: list[dict[Tensor, Tensor]] = [{} for _ in rows]
    copied_below = set(tables)

    def receive(number: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        left, places, parts = unreached[number], [], []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            place = left.pop(leaf, None)
            if place is None:
                own[number][leaf] = gradient if leaf in copied_below else gradient.clone()
            elif gradient.is_sparse:
                place.copy_(as_real(gradient.to_dense()))
            elif gradient.data_ptr() != place.data_ptr():
                places.append(place)
                parts.append(as_real(gradient))
        if places:
            torch._foreach_copy_(places, parts)

    differentiate(losses, reach, buffers, receive)
    for left in unreached:
        for place in left.values():
            place.zero_()
    looked_up: list[dict[Tensor, Tensor]] = [
        {table: found.pop(table) for table in tables if table in found} for found in own
    ]
    jacobian = TaskJacobian(reach.tasks, [*plain, *tables], matrix, dict(zip(reach.tasks, own, strict=True)))
    if tables:
        _add_tables(jacobian, tables, looked_up, workspace)
    return jacobian


def _add_tables(
    jacobian: TaskJacobian, tables: Sequence[Tensor], by_task: Sequence[Mapping[Tensor, Tensor]], workspace: Workspace
) -> None:
    """Give the tables their columns, from each task's `{table: gradient}`."""
    found = {table: {n: of[table] for n, of in enumerate(by_task) if table in of} for table in tables}
    touched = touched_rows(found)
    jacobian.rows = {table: of.rows for table, of in touched.items()}
    widths = list(map(jacobian.width, tables))
    start = jacobian.matrix.shape[1]
    jacobian.matrix = workspace.widened(jacobian.matrix, sum(widths))
    for table, columns in zip(tables, jacobian.matrix[:, start:].split(widths, dim=1), strict=True):
        for number, place in enumerate(columns):
            gradient = found[table].get(number)
            if gradient is None:
                place.zero_()
            elif table in touched:
                touched[table].put(number, gradient, place)
            else:
                place.copy_(as_real(gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1))


def _average(jacobian: TaskJacobian, reach: Reach) -> None:
    """Over the ranks, all of which must bring the same gradients in the same order."""
    shared = set(jacobian.shared)
    reached = [(task, p) for task, found in reach.parameters.items() for p in found if p not in shared]
    own = {p: reach.nothing(p) if (g := jacobian.own[task].get(p)) is None else g for task, p in reached}
    means = average_gradients(own, beside=[jacobian.matrix])
    for task, p in reached:
        jacobian.own[task][p] = means[p]


def width(leaf: Tensor) -> int:
    """The columns that a leaf takes in a Jacobian."""
    return leaf.numel() * (2 if leaf.is_complex() else 1)


def write_combination(jacobian: TaskJacobian, weights: Tensor | None = None) -> None:
    """Accumulate `weights @ J` into the shared parameters' `.grad`: the plain sum of the rows without weights (T,)."""
    weights = None if weights is None else weights.to(jacobian.matrix)
    start = 0
    for parameters in _pieces(jacobian):
        stop = start + sum(map(jacobian.width, parameters))
        rows = jacobian.matrix[:, start:stop]
        _write(jacobian, parameters, _sum(rows) if weights is None else weights @ rows)
        start = stop


def _sum(rows: Tensor) -> Tensor:
    """Of all rows; `sum()` takes twice as long on a CPU."""
    if len(rows) == 2:
        return rows[0] + rows[1]
    return rows.new_ones(len(rows)) @ rows if rows.device.type == "cpu" else rows.sum(dim=0)


def _pieces(jacobian: TaskJacobian) -> Iterator[list[nn.Parameter]]:
    """A large parameter alone, small ones together: memory for all at once would be new pages in every step."""
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in jacobian.shared:
        piece.append(parameter)
        size += jacobian.width(parameter)
        if size > _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def write_update(jacobian: TaskJacobian, update: Tensor) -> None:
    """Accumulate a (P,) update of the shared parameters into their `.grad`."""
    _write(jacobian, jacobian.shared, update)


@torch.no_grad()
def _write(jacobian: TaskJacobian, parameters: Sequence[nn.Parameter], update: Tensor) -> None:
    for parameter, part in zip(parameters, update.split(list(map(jacobian.width, parameters))), strict=True):
        if parameter.is_complex():
            part = torch.view_as_complex(part.view(-1, 2))
        rows = jacobian.rows.get(parameter)
        _accumulate(parameter, part.view(parameter.shape) if rows is None else from_rows(part, rows, parameter))


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
        same = gradient.dtype == leaf.dtype and gradient.device == leaf.device
        if not gradient.is_sparse and (not same or gradient.stride() != leaf.stride()):
            # Optimizers are quicker where the gradient lies in memory as its parameter does.
            gradient = torch.empty_like(leaf).copy_(gradient)
        leaf.grad = gradient
    elif grad.is_sparse or gradient.is_sparse:
        leaf.grad = add(grad, gradient)
    else:
        grad.add_(gradient.to(grad.device))
    for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(leaf)
