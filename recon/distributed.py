"""Several processes that train one model: what every rank must know, and what is averaged over them.

The rules are those of DistributedDataParallel: each rank brings its own part of the batch, and every gradient is the
mean over the ranks, zero counting for a rank that has none. Task gradients are averaged before anything is made of
them, cosines or updates; so each rank makes the same. With one process, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from recon.batches import unpack
from recon.errors import ProblemError, UsageError
from recon.problem import Batch
from recon.reach import Reach


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


def agree_on_reach(reach: Reach, parameters: Sequence[nn.Parameter]) -> Reach:
    """What each task reaches on any of the ranks; a rank may lack a task's targets.

    Raises:
        UsageError: the ranks do not have the same parameters.
    """
    if world_size() == 1:
        return reach
    number_of = {p: number for number, p in enumerate(parameters)}
    mine = {task: [number_of[p] for p in found] for task, found in reach.parameters.items()}
    everyone = gather((len(parameters), mine))
    if len({count for count, _ in everyone}) > 1:
        raise UsageError(
            f"The ranks' models have {[count for count, _ in everyone]} parameters. Build the same model on each."
        )
    reached: dict[str, set[nn.Parameter]] = {}
    for _, theirs in everyone:
        for task, numbers in theirs.items():
            reached.setdefault(task, set()).update(parameters[number] for number in numbers)
    return Reach.of_tasks(reached, parameters, reach.outside)


def average_losses(losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """`{task: mean loss}`, detached, over the ranks that have one; a weighting must weigh alike on all of them.

    Args:
        losses: this rank's.
        tasks: those that any rank has, as `agree_on_reach` says.
        device: where the model is.
    """
    if world_size() == 1:
        return {task: loss.detach() for task, loss in losses.items()}
    # One precision on all ranks, whether they have losses or not: their weights must not differ by a rounding.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums, counts = torch.zeros(2, len(tasks), dtype=dtype, device=device)
    for number, task in enumerate(tasks):
        if task in losses:
            sums[number] = losses[task].detach()
            counts[number] = 1
    average_([sums, counts])
    return dict(zip(tasks, sums / counts, strict=True))


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the model of rank 0."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_answer(answer: bool) -> bool:
    """Rank 0's answer to a question that all ranks were asked."""
    return bool(gather(answer)[0])


class RankBatches:
    """A loader's batches, each cut into equal parts, of which this rank gets its own.

    The ranks together so see the batches that one process would see; up to N - 1 samples of a batch that N does not
    divide are left out. Every rank reads whole batches.

    Args:
        loader: gives the same batches on every rank.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        number, ranks = rank(), world_size()
        for batch in self.loader:
            size = _batch_size(batch) // ranks
            mine = slice(number * size, (number + 1) * size)
            if size:
                yield tree_map(lambda leaf, mine=mine: None if leaf is None else leaf[mine], unpack(batch))


def _batch_size(batch: Any) -> int:
    leaves = tree_leaves(unpack(batch))
    sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves if leaf is not None}
    size = next(iter(sizes), None)
    if len(sizes) != 1 or size is None:
        raise ProblemError(
            "This problem's batches cannot be shared out over several processes: they hold more than tensors with the "
            "samples first. Profile in one process, or call recon.profile on each rank with a loader of its own."
        )
    return size


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of the ranks."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value, group=_control_group(dist.group.WORLD))
    return everyone


@cache
def _control_group(world: Any) -> Any:
    # Small talk between CPUs: through NCCL it would wait for the GPU.
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
