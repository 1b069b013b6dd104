import copy
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recon.branching.conversion import convert
from recon.branching.plan import BranchPlan, Mode, plan_of
from recon.errors import UsageError
from recon.support.network.layers import find_layers
from tests import oracle
from tests.ranks import WORLD, Ranks, needs_gloo
from tests.ranks import ranks as ranks
from tests.zoo import TASKS, ZOO, image

pytestmark = needs_gloo

_NO_BATCH_STATISTICS = ["CatAndStack", "ParameterLists", "TransformerEncoder", "TiedWeights"]


# What the ranks share.


def branch(name: str, layers: list[str] | None = None, mode: Mode = "fan") -> nn.Module:
    """The same model on every rank; all shared layers branched if none are named, some of them in groups."""
    torch.manual_seed(0)
    model = ZOO[name].make()
    plan = BranchPlan.per_task(layers, TASKS) if layers else _random_plan(model)
    branched = convert(model, plan, ZOO[name].inputs(4), mode=mode)
    oracle.perturb(branched)
    return branched


def _random_plan(model: nn.Module) -> BranchPlan:
    # A task's head is left out: DDP waits for the gradients of the copies that no other task uses.
    draw = random.Random(0)
    shared = [layer.name for layer in find_layers(model) if not layer.name.startswith("heads.")]
    return BranchPlan.grouped({name: oracle.random_groups(TASKS, draw) for name in shared}, TASKS)


def shards(name: str, seed: int = 0, samples: int = 3) -> list[Tensor]:
    """Each rank's batch, known to all."""
    torch.manual_seed(seed + 1)
    return list(ZOO[name].inputs(WORLD * samples).chunk(WORLD))


def loss_of(outputs: dict[str, Tensor], task: str) -> Tensor:
    """A mean over samples, so that the mean over ranks is that over the global batch."""
    weight = torch.randn(outputs[task].shape[1:], generator=torch.Generator().manual_seed(ord(task)))
    return ((outputs[task] * weight).sum(1) + outputs[task].square().sum(1)).mean()


def total(outputs: dict[str, Tensor], tasks: tuple[str, ...] = TASKS) -> Tensor:
    return sum(loss_of(outputs, task) for task in tasks)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def assert_gradients(ddp: nn.Module, expected: dict[str, Tensor | None]) -> None:
    found = gradients(ddp)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            oracle.assert_close(found[name], gradient, f"gradient of {name}")


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        others = [torch.empty_like(parameter) for _ in range(WORLD)]
        dist.all_gather(others, parameter.detach())
        assert all(torch.equal(parameter, other) for other in others), name


# Gradients.


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("name", _NO_BATCH_STATISTICS)
def test_ranks_train_as_one_process_does_on_the_global_batch(ranks: Ranks, name: str, options: dict[str, Any]) -> None:
    ranks.run(_train_as_one, name, "fan", options)


@pytest.mark.parametrize("name", _NO_BATCH_STATISTICS)
def test_ranks_train_as_one_process_does_in_per_task_mode(ranks: Ranks, name: str) -> None:
    ranks.run(_train_as_one, name, "per-task", {})


def _train_as_one(rank: int, name: str, mode: Mode, options: dict[str, Any]) -> None:
    single = branch(name, mode=mode)
    ddp = DistributedDataParallel(copy.deepcopy(single), **options)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (single, ddp)]
    for step in range(3):  # DDP orders its buckets anew after the first
        batches = shards(name, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total(single(torch.cat(batches))).backward()
        total(ddp(batches[rank])).backward()
        assert_gradients(ddp, gradients(single))
        for optimizer in optimizers:
            optimizer.step()
    assert_same_on_all_ranks(ddp)


@pytest.mark.parametrize("name", ["ResidualNet", "StatisticsAroundStatistics"])
def test_gradients_with_batch_statistics_are_the_mean_over_the_ranks(ranks: Ranks, name: str) -> None:
    ranks.run(_mean_over_ranks, name)


def _mean_over_ranks(rank: int, name: str) -> None:
    ddp = DistributedDataParallel(branch(name))
    single = branch(name)
    statistics = copy.deepcopy(dict(single.named_buffers()))
    for batch in shards(name):
        for buffer_name, buffer in single.named_buffers():
            buffer.copy_(statistics[buffer_name])
        (total(single(batch)) / WORLD).backward()
    total(ddp(shards(name)[rank])).backward()
    assert_gradients(ddp, gradients(single))


def test_statistics_are_each_rank_s_own_as_with_plain_models(ranks: Ranks) -> None:
    ranks.run(_statistics_as_plain)


def _statistics_as_plain(rank: int) -> None:
    """Each rank normalises by its own batch, and starts every step from the statistics of the first rank."""
    entry = ZOO["ResidualNet"]
    branched = branch("ResidualNet", ["blocks.0.conv1", "blocks.1.bn2"])
    assert {"blocks.0.bn1", "blocks.1.bn1"} <= set(plan_of(branched).statistics)  # kept by task, not branched
    plains = {task: oracle.plain_model(entry.make, branched, task) for task in TASKS}
    keys = {task: oracle.keys_of(branched, task, set(oracle.state_of(plain))) for task, plain in plains.items()}
    ddp = DistributedDataParallel(branched)
    # The other tasks' heads get no gradient from a plain model.
    wrapped = {t: DistributedDataParallel(plain, find_unused_parameters=True) for t, plain in plains.items()}
    for step in range(3):
        batch = shards("ResidualNet", step)[rank]
        outputs = ddp(batch)
        total(outputs).backward()
        buffers = dict(branched.named_buffers())
        for task, model in wrapped.items():
            expected = model(batch)
            loss_of(expected, task).backward()
            oracle.assert_close(outputs[task], expected[task], f"output of {task}")
            for key, buffer in plains[task].named_buffers():
                oracle.assert_close(buffers[keys[task][key]], buffer, f"{key} of {task}")
    mean = dict(branched.named_buffers())["blocks.0.bn1.branches.a.running_mean"]
    means = [torch.empty_like(mean) for _ in range(WORLD)]
    dist.all_gather(means, mean)
    assert not torch.allclose(means[0], means[1]), "the ranks saw the same batches"


# Accumulation and the order of backward passes.


@pytest.mark.parametrize("name", _NO_BATCH_STATISTICS)
def test_gradients_accumulate_without_sync(ranks: Ranks, name: str) -> None:
    ranks.run(_accumulate, name)


def _accumulate(rank: int, name: str) -> None:
    single = branch(name)
    ddp = DistributedDataParallel(copy.deepcopy(single))
    mine = [shards(name, step)[rank] for step in range(3)]
    for step in range(3):
        total(single(torch.cat(shards(name, step)))).backward()
    with ddp.no_sync():
        for batch in mine[:-1]:
            total(ddp(batch)).backward()
    local = {key: None if gradient is None else gradient.clone() for key, gradient in gradients(ddp).items()}
    gathered: list[Any] = [None] * WORLD
    dist.all_gather_object(gathered, local)
    assert any(not torch.equal(gathered[0][key], gathered[1][key]) for key in local), "synchronised too early"
    total(ddp(mine[-1])).backward()
    assert_gradients(ddp, gradients(single))


_ORDERS = [("a", "b", "c"), ("c", "a", "b")]


@pytest.mark.parametrize("name", ["CatAndStack", "ParameterLists"])
def test_ranks_may_compute_their_losses_in_different_orders(ranks: Ranks, name: str) -> None:
    ranks.run(_orders, name)


def _orders(rank: int, name: str) -> None:
    single = branch(name)
    ddp = DistributedDataParallel(copy.deepcopy(single))
    for step in range(3):
        batches = shards(name, step)
        single.zero_grad()
        ddp.zero_grad()
        total(single(torch.cat(batches))).backward()
        total(ddp(batches[rank]), _ORDERS[(rank + step) % 2]).backward()
        assert_gradients(ddp, gradients(single))


@pytest.mark.parametrize("name", ["CatAndStack", "ParameterLists"])
def test_one_backward_per_task_in_any_order(ranks: Ranks, name: str) -> None:
    ranks.run(_backward_per_task, name)


def _backward_per_task(rank: int, name: str) -> None:
    """The last backward synchronises what the others have accumulated, for the copies too that it does not reach."""
    single = branch(name)
    ddp = DistributedDataParallel(copy.deepcopy(single), find_unused_parameters=True)
    batches = shards(name)
    total(single(torch.cat(batches))).backward()
    *before, last = _ORDERS[rank]
    with ddp.no_sync():
        for task in before:
            loss_of(ddp(batches[rank]), task).backward()
    outputs = ddp(batches[rank])
    loss_of({task: outputs[task] if task == last else outputs[task].detach() for task in TASKS}, last).backward()
    assert_gradients(ddp, gradients(single))


# A task without targets in a batch.


class WithLosses(nn.Module):
    """The way around DDP's rule that every output take part in the loss: it gives the loss itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        return total(self.network(x), tasks)


@pytest.mark.parametrize("lacking", [(0,), (0, 1)], ids=["one rank", "both ranks"])
@pytest.mark.parametrize("name", ["CatAndStack", "ParameterLists"])
def test_a_batch_that_lacks_a_task(ranks: Ranks, name: str, lacking: tuple[int, ...]) -> None:
    ranks.run(_lack_a_task, name, lacking)


def _lack_a_task(rank: int, name: str, lacking: tuple[int, ...]) -> None:
    single = branch(name)
    ddp = DistributedDataParallel(WithLosses(copy.deepcopy(single)), find_unused_parameters=True)
    for step in range(3):
        batches = shards(name, step)
        tasks = [tuple(task for task in TASKS if step == 0 or task != "b" or r not in lacking) for r in range(WORLD)]
        single.zero_grad()
        ddp.zero_grad()
        for batch, present in zip(batches, tasks, strict=True):
            (total(single(batch), present) / WORLD).backward()
        ddp(batches[rank], tasks[rank]).backward()
        found = {key.removeprefix("network."): gradient for key, gradient in gradients(ddp).items()}
        idle = [key for key, gradient in gradients(single).items() if gradient is None]
        assert bool(idle) == (step > 0 and len(lacking) == WORLD)  # b's own copies
        for key, gradient in gradients(single).items():
            assert (found[key] is None) == (gradient is None), key
            if gradient is not None:
                oracle.assert_close(found[key], gradient, key)


def test_a_task_multiplied_by_zero(ranks: Ranks) -> None:
    ranks.run(_times_zero)


def _times_zero(rank: int) -> None:
    """The other way around DDP's rule: no unused parameters, and zeros for what the task alone reaches."""
    single = branch("CatAndStack")
    ddp = DistributedDataParallel(copy.deepcopy(single))
    for step in range(2):
        batches = shards("CatAndStack", step)
        single.zero_grad()
        ddp.zero_grad()
        for batch in batches:
            outputs = single(batch)
            ((total(outputs, ("a", "c")) + 0 * loss_of(outputs, "b")) / WORLD).backward()
        outputs = ddp(batches[rank])
        (total(outputs, ("a", "c")) + 0 * loss_of(outputs, "b")).backward()
        assert_gradients(ddp, gradients(single))
        assert gradients(ddp)["heads.heads.b.weight"].count_nonzero() == 0


# What is refused.


def test_a_wrapped_model_is_refused(ranks: Ranks) -> None:
    ranks.run(_refuse_wrapped)


def _refuse_wrapped(rank: int) -> None:
    model = ZOO["PlainConv"].make()
    plan = BranchPlan.per_task(["body.1.0"], TASKS)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(UsageError, match=r"wrapped in DistributedDataParallel.*the plain module inside \(model.module"):
        convert(wrapped, plan, image(2))
    with torch.no_grad():
        outputs, expected = convert(wrapped.module, plan, image(2)).eval()(x := image(2)), model.eval()(x)
    assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)


# Last: it stops the ranks.


def test_a_check_that_fails_on_one_rank_fails(ranks: Ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1: (.|\n)*AssertionError: no"):
        ranks.run(_fail_on_the_last_rank)


def _fail_on_the_last_rank(rank: int) -> None:
    assert rank == 0, "no"
