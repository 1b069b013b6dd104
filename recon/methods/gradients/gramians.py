"""Task Gramians, layer by layer: all that a step's cosines need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from recon.methods.gradients.jacobian import TaskJacobian
from recon.methods.gradients.sparse import entries

_IN_CACHE = 1 << 18  # numbers of a block held at a time: it stays in a CPU's cache
_ON_DEVICE = 1 << 24  # elsewhere, launching kernels is what costs time


class _Columns(NamedTuple):
    """A layer's columns of the Jacobian."""

    layer: int
    start: int
    stop: int


def gramian(jacobian: TaskJacobian) -> Tensor:
    """J Jᵀ in float64, (T, T)."""
    parts = list(_shared_gramians(jacobian, {p: number for number, p in enumerate(jacobian.shared)}).values())
    return torch.stack(parts).sum(dim=0) if parts else _nothing(jacobian).sum(dim=0)


def layer_gramians(jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> tuple[list[int], Tensor]:
    """The Gramian G_k = J_k J_kᵀ of every shared layer, weight and bias together: one product, no loop over pairs.

    In float64, for cosines that are exact and independent of the loss scale: squares of gradients near 1e-25
    vanish in float32, and a float32 sum over a million elements is off by 1e-5. Products of float32 gradients are
    exact, and their sum over n columns is off by at most n × 1.1e-16 of the norms: a billionth for ten million.
    (Apple's MPS has no float64.)

    `layer_of` numbers the layers by their parameters; the others are left out. A layer whose parameters lie apart in
    the Jacobian takes a product for each piece. Returns the L layers' numbers, and (L, T, T), zero where a task does
    not reach.
    """
    found = _shared_gramians(jacobian, layer_of)
    _add_own(found, jacobian, layer_of)
    numbers = sorted(found)
    return numbers, torch.stack([found[number] for number in numbers]) if numbers else _nothing(jacobian)


def _nothing(jacobian: TaskJacobian) -> Tensor:
    tasks, matrix = len(jacobian.tasks), jacobian.matrix
    return torch.zeros(0, tasks, tasks, dtype=wide(matrix), device=matrix.device)


def _shared_gramians(jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> dict[int, Tensor]:
    """By layer, of the shared parameters."""
    matrix = jacobian.matrix
    room = block_columns(matrix.device, len(matrix))
    found: dict[int, Tensor] = {}
    for layers in _batches(_columns(jacobian, layer_of), room):
        for columns, part in zip(layers, _gramians(matrix, layers, room), strict=True):
            found[columns.layer] = found[columns.layer] + part if columns.layer in found else part
    return found


def block_columns(device: torch.device, rows: int) -> int:
    """How many columns of so many rows are multiplied at a time."""
    return max(1, (_IN_CACHE if device.type == "cpu" else _ON_DEVICE) // max(1, rows))


def _columns(jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> Iterator[_Columns]:
    start = 0
    for layer, parameters in groupby(jacobian.shared, key=layer_of.get):
        stop = start + sum(map(jacobian.width, parameters))
        if layer is not None and stop > start:  # a parameter may have no elements
            yield _Columns(layer, start, stop)
        start = stop


def _batches(layers: Iterator[_Columns], room: int) -> Iterator[list[_Columns]]:
    """Small layers together, as many as fit into `room` columns; a larger one alone."""
    batch: list[_Columns] = []
    for columns in layers:
        if batch and columns.stop - batch[0].start > room:
            yield batch
            batch = []
        batch.append(columns)
    if batch:
        yield batch


def _gramians(matrix: Tensor, layers: list[_Columns], room: int) -> list[Tensor]:
    """The Gramians of neighbouring layers, from one block; a large layer's in pieces."""
    first, last = layers[0].start, layers[-1].stop
    rows = matrix[:, first:last]
    if last - first > room:
        return [torch.stack([_self_product(piece.to(wide(piece))) for piece in rows.split(room, dim=1)]).sum(dim=0)]
    block = rows.to(wide(rows))
    return [_self_product(block[:, start - first : stop - first]) for _, start, stop in layers]


def _self_product(block: Tensor) -> Tensor:
    """`block @ block.T`, (T, T)."""
    with torch.autocast(block.device.type, enabled=False):
        return block @ block.mT


def wide(tensor: Tensor) -> torch.dtype:
    """What its products are summed in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _add_own(found: dict[int, Tensor], jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> None:
    """Parameters that one task alone reaches count in the norms of a layer that it shares otherwise."""
    tasks_of: defaultdict[int, set[str]] = defaultdict(set)
    for task, gradients in jacobian.own.items():
        for leaf in gradients:
            if leaf in layer_of:
                tasks_of[layer_of[leaf]].add(task)
    for number, task in enumerate(jacobian.tasks):
        for leaf, gradient in jacobian.own[task].items():
            layer = layer_of.get(leaf, -1)
            if layer not in found and len(tasks_of[layer]) < 2:
                continue
            if layer not in found:
                size = (len(jacobian.tasks),) * 2
                found[layer] = torch.zeros(size, dtype=wide(gradient), device=jacobian.matrix.device)
            row = entries(gradient)
            square = row.to(wide(row)).square().sum()
            found[layer][number, number] += square.to(found[layer].device)
