"""Windows of several processes: each rank adds its own part, or none, and all do what `recon.backward` does there."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import recon
from recon.errors import UsageError
from tests.methods.test_distributed_gradients import assert_same_map
from tests.ranks import Ranks, needs_gloo
from tests.ranks import ranks as ranks

pytestmark = needs_gloo

TASKS = ("a", "b", "c")


class Heads(nn.Module):
    """A table of embeddings, a body, and the head that is asked for."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6, sparse=sparse)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})
        self.double()

    def forward(self, x: torch.Tensor, task: str) -> torch.Tensor:
        return self.heads[task](self.body(self.table(x)))


def loss_of(model: nn.Module, x: torch.Tensor, task: str) -> torch.Tensor:
    return (model(x, task) - ord(task) + 97).square().mean()


@pytest.mark.parametrize("memory", [None, "exact", "sketch"])
@pytest.mark.parametrize("method", ["joint", "gradnorm", "uw+mgda"])
def test_windows_of_ranks(ranks: Ranks, method: str, memory: str | None) -> None:
    if memory == "sketch" and method != "joint":
        pytest.skip("as with None, or for weightings alone")
    ranks.run(_check, method, memory)


def _check(rank: int, method: str, memory: str | None) -> None:
    for sparse, wrap in ((True, False), (False, True)):
        at_once, by_task = Heads(sparse), Heads(sparse)
        model = DistributedDataParallel(by_task, find_unused_parameters=True) if wrap else by_task
        chosen = [recon.methods.parse(method) for _ in range(2)]
        for each in chosen:
            each.setup(TASKS)
            each.double()
        profilers = [memory and recon.Profiler(each, memory=memory) for each in (at_once, model)]
        window = recon.Window(model, chosen[1], profiler=profilers[1])
        for step, absent in enumerate([("b",), TASKS, ()]):  # tasks that the second rank lacks
            draw = torch.Generator().manual_seed(step)
            parts = {task: torch.randint(20, (2, 5), generator=draw)[rank] for task in TASKS}
            mine = [task for task in TASKS if rank == 0 or task not in absent]
            losses = {task: loss_of(at_once, parts[task], task) for task in mine}
            expected = recon.backward(losses, at_once, chosen[0], profiler=profilers[0])
            for task in mine:
                window.add(task, loss_of(model, parts[task], task))
            weights = window.step()
            assert {t: w.item() for t, w in weights.items()} == pytest.approx(
                {t: w.item() for t, w in expected.items()}
            )
            for ours, theirs in zip(by_task.parameters(), at_once.parameters(), strict=True):
                assert ours.grad.is_sparse == theirs.grad.is_sparse == (sparse and ours is by_task.table.weight)
                torch.testing.assert_close(_dense(ours.grad), _dense(theirs.grad), rtol=1e-9, atol=1e-12)
            at_once.zero_grad()
            by_task.zero_grad()
        if memory:
            assert_same_map(*profilers)


def test_every_task_is_on_some_rank(ranks: Ranks) -> None:
    ranks.run(_check_missing)


def _check_missing(rank: int) -> None:
    model = Heads(False)
    window = recon.Window(model, tasks=TASKS)
    window.add(TASKS[rank], loss_of(model, torch.arange(3), TASKS[rank]))
    with pytest.raises(UsageError, match="lacks the tasks c; added are a, b"):
        window.step()
    window.add("c", loss_of(model, torch.arange(3), "c") if rank else None)
    window.step()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor
