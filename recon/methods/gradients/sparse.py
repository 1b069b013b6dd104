"""Sparse gradients: a table of embeddings (`sparse=True`) gets the rows that a step looked up, and nothing else.

They are torch's COO tensors, in which a row may come several times. What is done to them here takes time and memory by
the rows that they hold, never by the table's size. A row is what one column of the tensor's indices leads to: of
`torch.gather(sparse_grad=True)`, a single number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    if not total.is_sparse:
        return total.add_(gradient)
    if not gradient.is_sparse:
        return gradient + total
    if torch.equal(total._indices(), gradient._indices()):  # two tasks' gradients of one lookup
        total._values().add_(gradient._values())
        return total
    return total.add_(gradient)


def row_numbers(indices: Tensor, shape: Size) -> Tensor:
    """(n,): one number for each of a COO tensor's indices (d, n)."""
    numbers = indices[0]
    for index, size in zip(indices[1:], shape[1:], strict=False):
        numbers = numbers * size + index
    return numbers


@dataclass(frozen=True)
class Touched:
    """The rows of a table that some gradients touch."""

    rows: Tensor  # (d, n) as a COO tensor's indices, in rising order and each once
    places: Mapping[int, Tensor]  # by the number of a gradient: where its rows are among them

    def put(self, number: int, gradient: Tensor, out: Tensor) -> None:
        """Write a gradient, in real numbers, to `out`, (n × numbers in a row,)."""
        out = out.view(self.rows.shape[1], -1)
        values = as_real(gradient._values()).reshape(gradient._nnz(), out.shape[1])
        out.zero_().index_add_(0, self.places[number], values.to(out.dtype))


def touched_rows(gradients: Mapping[Leaf, Mapping[int, Tensor]]) -> dict[Leaf, Touched]:
    """Which rows of each table any of its gradients, of any task on any rank, touches.

    A table is not in the answer if all of its rows count: it got a gradient that is not sparse, or that has rows of
    another kind.

    Args:
        gradients: `{table: {number of the task: gradient}}`.
    """
    kinds = {leaf: {g.sparse_dim() if g.is_sparse else 0 for g in of.values()} for leaf, of in gradients.items()}
    everyone = gather(list(kinds.values()))  # the ranks' tables come in the same order
    touched = {}
    for leaf, *of_ranks in zip(kinds, *everyone, strict=True):
        dims = set().union(*of_ranks) or {1}  # without a gradient on any rank, no row is touched
        if len(dims) == 1 and dims != {0}:
            touched[leaf] = _touched(gradients[leaf], leaf, *dims)
    return touched


def _touched(gradients: Mapping[int, Tensor], leaf: Tensor, dims: int) -> Touched:
    lookups: list[Tensor] = []
    lookup_of = {}
    for number, gradient in gradients.items():
        indices = gradient._indices()
        same = (i for i, other in enumerate(lookups) if torch.equal(indices, other))  # tasks often share one lookup
        lookup_of[number] = next(same, len(lookups))
        if lookup_of[number] == len(lookups):
            lookups.append(indices)
    nowhere = torch.empty(dims, 0, dtype=torch.int64, device=leaf.device)
    rising, order = row_numbers(torch.cat([nowhere, *lookups], dim=1), leaf.shape).sort()
    rows, inverse = torch.unique_consecutive(rising, return_inverse=True)  # torch.unique takes 15 times as long
    places = torch.empty_like(order).scatter_(0, order, inverse)
    if world_size() > 1:
        everyones = torch.unique_consecutive(gather_rows(rows).sort().values)
        places = torch.searchsorted(everyones, rows)[places]
        rows = everyones
    of_lookup = places.split([lookup.shape[1] for lookup in lookups]) if lookups else ()
    indices = torch.stack(torch.unravel_index(rows, leaf.shape[:dims])) if dims > 1 else rows[None]
    return Touched(indices, {number: of_lookup[lookup] for number, lookup in lookup_of.items()})


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
    tables = {leaf: {0: g} for (leaf, g), *anywhere in zip(gradients.items(), *sparse, strict=True) if any(anywhere)}
    touched = touched_rows(tables)
    means = {leaf: g.to_dense() if g.is_sparse and leaf not in touched else g for leaf, g in gradients.items()}
    for leaf, of in touched.items():
        means[leaf] = leaf.new_empty(of.rows.shape[1], *leaf.shape[len(of.rows) :])
        of.put(0, gradients[leaf], as_real(means[leaf]).view(-1))
    average_([*beside, *means.values()])
    return means | {leaf: from_rows(means[leaf], of.rows, leaf) for leaf, of in touched.items()}
