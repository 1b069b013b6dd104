"""Products of the task gradients of two batches at the same weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recon.methods.gradients.gramians import block_columns, wide
from recon.methods.gradients.jacobian import TaskJacobian
from recon.methods.gradients.sparse import entries, meeting, row_numbers


class Products(NamedTuple):
    """Of the T task gradients g_i of one batch, and the T' task gradients g'_j of another, in L layers."""

    across: Tensor  # (L, T, T'): g_i . g'_j
    squares: Tensor  # (L, T): g_i . g_i
    second_squares: Tensor  # (L, T'): g'_j . g'_j


class _Rows(NamedTuple):
    """One parameter's gradients (n, w), of the tasks of these n numbers."""

    tasks: Sequence[int]
    rows: Tensor
    touched: Tensor | None = None  # of a table: the indices of the rows that the columns stand for; all if None


def cross_gramians(
    first: TaskJacobian, second: TaskJacobian, layers: Sequence[int], layer_of: Mapping[Tensor, int]
) -> Products:
    """What the cosines between the two batches' task gradients need, weight and bias together, in float64.

    It is zero where a task does not reach. As in `layer_gramians`, a parameter that one task alone reaches counts in
    the layers that it shares otherwise. The two need not reach, or share, the same parameters, nor touch the same rows
    of a table.
    """
    places = {layer: place for place, layer in enumerate(layers)}
    matrix = first.matrix
    sizes = ((len(first.tasks), len(second.tasks)), (len(first.tasks),), (len(second.tasks),))
    found = Products(*(torch.zeros(len(layers), *size, dtype=wide(matrix), device=matrix.device) for size in sizes))
    rows, others = _rows_of(first), _rows_of(second)
    for parameter in dict.fromkeys((*rows, *others)):
        place = places.get(layer_of.get(parameter, -1))
        if place is None:
            continue
        one, other = rows.get(parameter), others.get(parameter)
        if one is not None and other is not None and one.touched is None and other.touched is None:
            across, squares, second_squares = _products(one.rows, other.rows)
            _add(found.across[place], across, one.tasks, other.tasks)
            _add(found.squares[place], squares, one.tasks)
            _add(found.second_squares[place], second_squares, other.tasks)
            continue
        if one is not None and other is not None:
            across, *_ = _products(*_where_they_meet(one, other, parameter))
            _add(found.across[place], across, one.tasks, other.tasks)
        if one is not None:
            _add(found.squares[place], _squares(one.rows), one.tasks)
        if other is not None:
            _add(found.second_squares[place], _squares(other.rows), other.tasks)
    return found


def _add(total: Tensor, product: Tensor, *tasks: Sequence[int]) -> None:
    """Add to the entries of these tasks."""
    if total.shape == product.shape:
        total += product
    else:
        total[torch.meshgrid(*(torch.tensor(of, device=total.device) for of in tasks), indexing="ij")] += product


def _products(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Products`; a piece of the columns at a time, in memory that is used again."""
    count, columns = len(rows), rows.shape[1]
    room = min(columns, block_columns(rows.device, count + len(others)))
    block = torch.empty(count + len(others), room, dtype=wide(rows), device=rows.device)
    across, squares = block.new_zeros(count, len(others)), block.new_zeros(len(block))
    pieces = zip(rows.split(max(1, room), dim=1), others.split(max(1, room), dim=1), strict=True)
    for one, other in pieces:
        first, second = block[:count, : one.shape[1]].copy_(one), block[count:, : one.shape[1]].copy_(other)
        with torch.autocast(rows.device.type, enabled=False):
            across += first @ second.mT
        squares += block[:, : one.shape[1]].square().sum(dim=1)
    return across, squares[:count], squares[count:]


def _squares(rows: Tensor) -> Tensor:
    """The squared length of each row."""
    return _products(rows, rows[:0])[1]


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


def _rows_of(jacobian: TaskJacobian) -> dict[Tensor, _Rows]:
    """By parameter."""
    tasks = range(len(jacobian.tasks))
    parts = jacobian.matrix.split(list(map(jacobian.width, jacobian.shared)), dim=1)
    found: dict[Tensor, _Rows] = {
        p: _Rows(tasks, part, jacobian.rows.get(p)) for p, part in zip(jacobian.shared, parts, strict=True)
    }
    for number, task in zip(tasks, jacobian.tasks, strict=True):
        for leaf, gradient in jacobian.own[task].items():
            row = entries(gradient).reshape(1, -1).to(jacobian.matrix.device)
            found[leaf] = _Rows([number], row, gradient.coalesce().indices() if gradient.is_sparse else None)
    return {leaf: rows for leaf, rows in found.items() if rows.rows.numel()}
