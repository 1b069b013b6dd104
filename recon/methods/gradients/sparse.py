"""Sparse gradients: a table of embeddings (`sparse=True`) gets the rows that a step looked up, and nothing else.

They are torch's COO tensors, in which a row may come several times. What is done to them here takes time and memory by
the rows that they hold, never by the table's size. A row is what one column of the tensor's indices leads to: of
`torch.gather(sparse_grad=True)`, a single number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Size, Tensor

from recon.support.network.tensors import as_real
from recon.support.processes import average_, gather, gather_rows, world_size

Leaf = TypeVar("Leaf", bound=Tensor)


def entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, in real numbers, without the zeros that a sparse one leaves out."""
    return as_real(gradient.coalesce().values() if gradient.is_sparse else gradient)


def add(total: Tensor, gradient: Tensor) -> Tensor:
    """The sum, in place where that is possible; sparse if both are."""
    if total.is_sparse and not gradient.is_sparse:
        return gradient + total
    return total.add_(gradient)


def row_numbers(indices: Tensor, shape: Size) -> Tensor:
    """(n,): one number for each of a COO tensor's indices (d, n)."""
    numbers = indices[0]
    for index, size in zip(indices[1:], shape[1:], strict=False):
        numbers = numbers * size + index
    return numbers


def touched_rows(gradients: Mapping[Leaf, Sequence[Tensor]]) -> dict[Leaf, Tensor]:
    """Which rows of each table any of its gradients, of any task on any rank, touches.

    Returns `{table: indices}`, (d, n) as in a COO tensor, in rising order and each once. A table is not in it if all of
    its rows count: it got a gradient that is not sparse, or that has rows of another kind.
    """
    kinds = {leaf: {g.sparse_dim() if g.is_sparse else 0 for g in found} for leaf, found in gradients.items()}
    everyone = gather(list(kinds.values()))  # the ranks' tables come in the same order
    rows = {}
    for leaf, *of_ranks in zip(kinds, *everyone, strict=True):
        dims = set().union(*of_ranks) or {1}  # without a gradient on any rank, no row is touched
        if len(dims) > 1 or dims == {0}:
            continue
        (d,) = dims
        parts = [row_numbers(g._indices(), leaf.shape) for g in gradients[leaf]]
        numbers = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=leaf.device)
        if world_size() > 1:
            numbers = gather_rows(numbers)
        # torch.unique takes many times as long on a CPU.
        numbers = torch.unique_consecutive(numbers.sort().values)
        rows[leaf] = torch.stack(torch.unravel_index(numbers, leaf.shape[:d])) if d > 1 else numbers[None]
    return rows


def put(gradient: Tensor, place: Tensor, rows: Tensor, shape: Size) -> None:
    """Write a sparse gradient, in real numbers, to its place among the touched rows.

    Args:
        gradient: of a table of this shape.
        place: (n × numbers in a row,).
        rows: (d, n), see `touched_rows`; all rows of the gradient are among them.
        shape: of the table.
    """
    place = place.view(rows.shape[1], -1)
    at = torch.searchsorted(row_numbers(rows, shape), row_numbers(gradient._indices(), shape))
    values = as_real(gradient._values())
    place.zero_().index_add_(0, at, values.reshape(len(at), place.shape[1]).to(place.dtype))


def meeting(rows: Tensor, others: Tensor, shape: Size) -> tuple[Tensor, Tensor]:
    """Where the rows are that two steps both touched: (m,) places among the `rows`, and the same rows' among `others`.

    Both are those of one table of this shape, see `touched_rows`. All other rows are zero in one of the two steps.
    """
    first, second = row_numbers(rows, shape), row_numbers(others, shape)
    if not len(second):
        return second, second
    at = torch.searchsorted(second, first).clamp_(max=len(second) - 1)
    here = (second[at] == first).nonzero().flatten()
    return here, at[here]


def from_rows(values: Tensor, rows: Tensor, leaf: Tensor) -> Tensor:
    """A gradient of a table: `values` (n, ...) in these rows (d, n), zero elsewhere."""
    values = values.reshape(rows.shape[1], *leaf.shape[len(rows) :]).to(leaf.device, leaf.dtype)
    return torch.sparse_coo_tensor(rows, values, leaf.shape, is_coalesced=True, check_invariants=False)


def no_rows(leaf: Tensor) -> Tensor:
    """A gradient of a table that touches none of its rows."""
    nowhere = torch.empty(1, 0, dtype=torch.int64, device=leaf.device)
    return from_rows(leaf.new_empty(0, *leaf.shape[1:]), nowhere, leaf)


def average_gradients(gradients: Mapping[Leaf, Tensor], beside: Iterable[Tensor] = ()) -> dict[Leaf, Tensor]:
    """The means of `{leaf: gradient}` over the ranks, all of which must bring the same leaves, in the same order.

    A mean is sparse if the gradients of all ranks are. It may lie where the gradient was. The tensors `beside` become
    means in place, in the same messages.
    """
    if world_size() == 1:
        return dict(gradients)
    sparse = gather([gradient.is_sparse for gradient in gradients.values()])
    tables = {leaf: [gradient] for (leaf, gradient), *any_ in zip(gradients.items(), *sparse, strict=True) if any(any_)}
    rows = touched_rows(tables)
    means = {leaf: g.to_dense() if g.is_sparse and leaf not in rows else g for leaf, g in gradients.items()}
    for leaf, touched in rows.items():
        means[leaf] = leaf.new_zeros(touched.shape[1], *leaf.shape[len(touched) :])
        put(gradients[leaf], as_real(means[leaf]).view(-1), touched, leaf.shape)
    average_([*beside, *means.values()])
    return means | {leaf: from_rows(means[leaf], touched, leaf) for leaf, touched in rows.items()}
