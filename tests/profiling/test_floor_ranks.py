"""The noise floor where two processes train together: that of one process on the global batches."""

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

import recon
from recon.profiling.floor import Comparison
from recon.profiling.profiler import Profiler
from recon.support.processes import gather
from tests.ranks import WORLD, Ranks, needs_gloo
from tests.ranks import ranks as ranks

pytestmark = needs_gloo

LOSSES = {"a": mse_loss, "b": l1_loss}


class Net(nn.Module):
    """No batch statistics: a mean over the ranks is that of the global batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.stem(x)))
        return {task: head(hidden).squeeze(1) for task, head in self.heads.items()}


def batches(part=slice(None)):
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        x = torch.randn(4 * WORLD, 6, generator=draw, dtype=torch.float64)
        targets = {"a": x.sum(1) + torch.randn(len(x), generator=draw, dtype=torch.float64), "b": x[:, 0]}
        yield x[part], {task: target[part] for task, target in targets.items()}


class Counting(Profiler):
    """Keeps the products of each floor as well."""

    def _count_floor(self, found):
        self.found = [*getattr(self, "found", []), found]
        super()._count_floor(found)


def profiled(loader, memory):
    torch.manual_seed(0)
    model = Net().double()
    profiler = Counting(model, tasks=tuple(LOSSES), floor=2, memory=memory)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recon.train(model, loader, LOSSES, optimizer=optimizer, profiler=profiler)
    return profiler


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_the_floor_is_that_of_the_global_batches(ranks: Ranks, memory: str) -> None:
    alone = profiled(list(batches()), memory).found
    assert len(alone) == 3
    ranks.run(_as_one, memory, alone)


def _as_one(rank: int, memory: str, alone: list[Comparison]) -> None:
    found = profiled(list(batches(slice(4 * rank, 4 * rank + 4))), memory).found
    assert len(found) == len(alone)
    for one, other in zip(found, alone, strict=True):
        assert one[:2] == other[:2]
        for left, right in zip(one[2:], other[2:], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-12 if memory == "exact" else 1e-6)


def test_ranks_agree_whether_there_is_a_second_batch_and_of_which_tasks(ranks: Ranks) -> None:
    ranks.run(_uneven)


def _uneven(rank: int) -> None:
    """Rank 1 never has a target of b; what it has of a is compared all the same, and b on rank 0."""
    mine = [
        (x, {task: target for task, target in targets.items() if task == "a" or rank == 0})
        for x, targets in batches(slice(4 * rank, 4 * rank + 4))
    ]
    profiler = profiled(mine, "exact")
    floor = profiler.conflict_map().layers[0].floor
    everyone = gather([floor.observed.tolist(), floor.conflicts.tolist()])
    assert everyone == [everyone[0]] * WORLD
    assert floor.observed.tolist() == [3, 3]
