"""Task Gramians, layer by layer: all that a step's cosines need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recon.gradients import TaskJacobian, as_real, width

_IN_CACHE = 1 << 18  # numbers of a block held at a time: it stays in a CPU's cache
_ON_DEVICE = 1 << 24  # elsewhere it is the launches that cost
_LONG = 1 << 15  # columns from which float64 is noticed in the time of a step
_BLOCK = 1 << 13  # columns of a matrix product in float32
_LONGEST = 1 << 18  # columns of a dot product in float32: its sum is off by less than 1e-7
_TINY, _HUGE = 1e-20, 1e20  # squared norms between which float32 loses nothing


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
    vanish in float32, and a float32 sum over a million elements is off by 1e-5. On a CPU, the blocks of a large layer
    are multiplied in float32 and summed up in float64, which is off by 1e-7 of the norms, unless these are so small
    or large that float32 would lose something. (Apple's MPS has no float64.)

    Args:
        jacobian: its shared parameters must come layer by layer.
        layer_of: the number of each parameter's layer.

    Returns:
        The L layers' numbers, and (L, T, T), zero where a task does not reach.
    """
    found = _shared_gramians(jacobian, layer_of)
    _add_own(found, jacobian, layer_of)
    numbers = sorted(found)
    return numbers, torch.stack([found[number] for number in numbers]) if numbers else _nothing(jacobian)


def _nothing(jacobian: TaskJacobian) -> Tensor:
    tasks, matrix = len(jacobian.tasks), jacobian.matrix
    return torch.zeros(0, tasks, tasks, dtype=_wide(matrix), device=matrix.device)


def _shared_gramians(jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> dict[int, Tensor]:
    """By layer, of the shared parameters."""
    matrix = jacobian.matrix
    room = _LONG if _is_flat(matrix) else max(1, (_IN_CACHE if _is_cpu(matrix) else _ON_DEVICE) // max(1, len(matrix)))
    found: dict[int, Tensor] = {}
    for layers in _batches(_columns(jacobian, layer_of), room):
        found.update(zip((columns.layer for columns in layers), _gramians(matrix, layers, room), strict=True))
    return found


def _columns(jacobian: TaskJacobian, layer_of: Mapping[Tensor, int]) -> Iterator[_Columns]:
    start = 0
    for layer, parameters in groupby(jacobian.shared, key=lambda p: layer_of[p]):
        stop = start + sum(map(width, parameters))
        if stop > start:  # a parameter may have no elements
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
        return [_gramian_in_pieces(rows, room)]
    block = rows.to(_wide(rows))
    if _is_flat(block):
        return _segment_gramians(block, [start - first for _, start, _ in layers])
    return [_self_product(block[:, start - first : stop - first]) for _, start, stop in layers]


def _segment_gramians(block: Tensor, starts: list[int]) -> list[Tensor]:
    """The Gramians of the segments that begin at `starts`, in a few calls for all of them together."""
    rows = block.numpy()
    i, j = np.triu_indices(len(rows))
    with np.errstate(invalid="ignore", over="ignore"):  # the tally skips the step
        sums = np.add.reduceat(rows[i] * rows[j], starts, axis=1)
    gramians = np.empty((len(starts), len(rows), len(rows)))
    gramians[:, i, j] = gramians[:, j, i] = sums.T
    return list(torch.from_numpy(gramians))


def _gramian_in_pieces(rows: Tensor, room: int) -> Tensor:
    if _is_cpu(rows) and rows.shape[1] > _LONG:
        # Twice as fast as float64, and these products are most of what the statistics cost.
        product = _flat_product(rows) if _is_flat(rows) else _blocked_product(rows)
        squares = product.diagonal()
        if ((squares > _TINY) & (squares < _HUGE)).all():
            return product
    return torch.stack([_self_product(piece.to(_wide(rows))) for piece in rows.split(room, dim=1)]).sum(dim=0)


def _flat_product(rows: Tensor) -> Tensor:
    """`rows @ rows.T` of two or three rows on a CPU, in float64.

    A product as flat as this takes BLAS twice as long as the dot products that it is made of.
    """
    i, j = torch.tril_indices(len(rows), len(rows)).tolist()
    dots = [torch.dot(piece[a], piece[b]) for piece in rows.split(_LONGEST, dim=1) for a, b in zip(i, j, strict=True)]
    product = torch.empty(len(rows), len(rows), dtype=torch.float64)
    product[i, j] = product[j, i] = torch.stack(dots).view(-1, len(i)).sum(dim=0, dtype=torch.float64)
    return product


def _blocked_product(rows: Tensor) -> Tensor:
    """`rows @ rows.T` of many rows on a CPU, in float64: products in float32 that share the cores, and their sum."""
    even = rows.shape[1] // _BLOCK * _BLOCK
    blocks = rows[:, :even].unflatten(1, (-1, _BLOCK)).transpose(0, 1)
    rest = rows[:, even:].double()
    return _self_product(blocks).sum(dim=0, dtype=torch.float64) + _self_product(rest)


def _self_product(block: Tensor) -> Tensor:
    """`block @ block.T`, (T, T), of each block."""
    with torch.autocast(block.device.type, enabled=False):
        return block @ block.mT


def _is_flat(rows: Tensor) -> bool:
    return len(rows) <= 3 and _is_cpu(rows)


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _wide(tensor: Tensor) -> torch.dtype:
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
                found[layer] = torch.zeros(size, dtype=_wide(gradient), device=jacobian.matrix.device)
            row = as_real(gradient)
            square = row.to(_wide(row)).square().sum()
            found[layer][number, number] += square.to(found[layer].device)
