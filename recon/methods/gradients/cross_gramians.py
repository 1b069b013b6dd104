"""Products of the task gradients of two batches at the same weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recon.methods.gradients.gramians import block_columns, self_product, wide
from recon.methods.gradients.jacobian import TaskJacobian
from recon.methods.gradients.sparse import entries, meeting, row_numbers


class _Rows(NamedTuple):
    """One parameter's gradients (n, w), of the tasks of these n numbers."""

    tasks: Sequence[int]
    rows: Tensor
    touched: Tensor | None = None  # of a table: the indices of the rows that the columns stand for; all if None


def cross_gramians(
    first: TaskJacobian, second: TaskJacobian, layers: Sequence[int], layer_of: Mapping[Tensor, int]
) -> Tensor:
    """The Gramian of both batches' task gradients in each of L layers, weight and bias together, in float64.

    (L, T + T', T + T'): the T tasks of the first, then the T' of the second; zero where a task does not reach. As in
    `layer_gramians`, a parameter that one task alone reaches counts in the layers that it shares otherwise. The two
    need not reach, or share, the same parameters, nor touch the same rows of a table.
    """
    places = {layer: place for place, layer in enumerate(layers)}
    size = len(first.tasks) + len(second.tasks)
    matrix = first.matrix
    found = torch.zeros(len(layers), size, size, dtype=wide(matrix), device=matrix.device)
    rows, others = _rows_of(first), _rows_of(second, len(first.tasks))
    for parameter in dict.fromkeys((*rows, *others)):
        place = places.get(layer_of.get(parameter, -1))
        if place is None:
            continue
        parts = [part[parameter] for part in (rows, others) if parameter in part]
        product = _product(parts, parameter)
        if len(product) == size:
            found[place] += product
        else:
            numbers = torch.tensor([n for part in parts for n in part.tasks], device=matrix.device)
            found[place, numbers[:, None], numbers] += product
    return found


def _product(parts: Sequence[_Rows], parameter: Tensor) -> Tensor:
    """The Gramian of the rows of one part, or of two."""
    if len(parts) == 1 or all(part.touched is None for part in parts):
        return _block_product([part.rows for part in parts])
    one, other = parts
    within = torch.block_diag(*(_block_product([part.rows]) for part in parts))
    across = _block_product(_where_they_meet(one, other, parameter))
    count = len(one.rows)
    within[:count, count:], within[count:, :count] = across[:count, count:], across[count:, :count]
    return within


def _where_they_meet(one: _Rows, other: _Rows, table: Tensor) -> list[Tensor]:
    """The columns of the table's rows that are not zero in both."""
    if one.touched is not None and other.touched is not None:
        here, there = meeting(one.touched, other.touched, table.shape)
        return [_of_rows(one, here, table), _of_rows(other, there, table)]
    touched = other.touched if one.touched is None else one.touched
    assert touched is not None
    places = row_numbers(touched, table.shape)
    every = torch.arange(len(places), device=places.device)
    return [_of_rows(part, places if part.touched is None else every, table, len(touched)) for part in (one, other)]


def _of_rows(part: _Rows, places: Tensor, table: Tensor, dims: int = 1) -> Tensor:
    """The columns of some rows, by their places; a row is what `dims` indices lead to."""
    count = table.shape[:dims].numel() if part.touched is None else part.touched.shape[1]
    return part.rows.unflatten(1, (count, -1))[:, places].flatten(1)


def _block_product(parts: Sequence[Tensor]) -> Tensor:
    """`block @ block.T` of all rows, a piece of their columns at a time."""
    room = block_columns(parts[0].device, sum(map(len, parts)))
    pieces = zip(*(part.split(room, dim=1) for part in parts), strict=True)
    return torch.stack([self_product(torch.cat([rows.to(wide(rows)) for rows in piece])) for piece in pieces]).sum(0)


def _rows_of(jacobian: TaskJacobian, offset: int = 0) -> dict[Tensor, _Rows]:
    """By parameter; the tasks are numbered from `offset`."""
    tasks = range(offset, offset + len(jacobian.tasks))
    parts = jacobian.matrix.split(list(map(jacobian.width, jacobian.shared)), dim=1)
    found: dict[Tensor, _Rows] = {
        p: _Rows(tasks, part, jacobian.rows.get(p)) for p, part in zip(jacobian.shared, parts, strict=True)
    }
    for number, task in zip(tasks, jacobian.tasks, strict=True):
        for leaf, gradient in jacobian.own[task].items():
            row = entries(gradient).reshape(1, -1).to(jacobian.matrix.device)
            found[leaf] = _Rows([number], row, gradient.coalesce().indices() if gradient.is_sparse else None)
    return {leaf: rows for leaf, rows in found.items() if rows.rows.numel()}
