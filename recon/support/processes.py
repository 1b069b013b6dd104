"""Several processes that train one model: how many there are, and what they send to each other.

With one process, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world_size() > 1 else 0


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in a few large messages."""
    ranks = world_size()
    if ranks == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in by_kind.values():
        whole = same[0] if len(same) == 1 and same[0].is_contiguous() else torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(whole)
        whole /= ranks
        if whole is not same[0]:
            for tensor, part in zip(same, whole.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the model of rank 0."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_answer(answer: bool) -> bool:
    """Rank 0's answer to a question that all ranks were asked."""
    return bool(gather(answer)[0])


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of the ranks."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value, group=_control_group(dist.group.WORLD))
    return everyone


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks, one rank's after the other's; n may differ between them."""
    if world_size() == 1:
        return rows
    counts = gather(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)])


@cache
def _control_group(world: Any) -> Any:
    # For small messages between CPUs: NCCL would wait for the GPU.
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
