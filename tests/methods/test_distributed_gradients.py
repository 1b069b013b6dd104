"""Task gradients of several processes: on the parts of a batch they do what one process does on the whole."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import recon
from recon.errors import ProblemError, UsageError
from recon.methods.bases.method import Method
from recon.methods.gradients.reach import average_losses
from recon.profiling.profiler import Profiler
from recon.support.processes import average_, broadcast_model, gather
from recon.training.batches.batch_stream import RankBatches
from tests.methods import test_sparse_gradients as sparse
from tests.profiling.test_distributed import branch, loss_of, shards
from tests.ranks import Ranks, needs_gloo
from tests.ranks import ranks as ranks
from tests.zoo import TASKS, ZOO

pytestmark = needs_gloo

STEPS = 4
MODELS = ["CatAndStack", "ParameterLists", "TransformerEncoder", "TiedWeights"]  # none has batch statistics


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name].make()


def losses_of(model: nn.Module, inputs: object, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    outputs = model(inputs)
    return {task: loss_of(outputs, task) for task in tasks}


def alone(model: nn.Module, name: str, method: str, **options: object) -> tuple[list[list[Tensor]], Profiler]:
    """Each step's gradients, and the profiler, of one process with the whole batches."""
    method, profiler = recon.methods.parse(method), Profiler(model, **options)
    method.setup(TASKS)
    found = []
    for step in range(STEPS):
        model.zero_grad()
        batches = shards(name, step)
        parts = [losses_of(model, batch) for batch in batches]
        losses = {task: sum(part[task] for part in parts) / len(parts) for task in TASKS}
        with one_process():
            recon.backward(losses, model, method, profiler=profiler)
        found.append([p.grad.clone() for p in [*model.parameters(), *method.parameters()] if p.grad is not None])
    return found, profiler


@contextmanager
def one_process() -> Iterator[None]:
    """As if there were no other rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        yield


def assert_same_map(profiler: Profiler, expected: Profiler) -> None:
    ours, theirs = profiler.conflict_map(), expected.conflict_map()
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.histogram.tolist() == other.histogram.tolist()
        assert one.conflicts.tolist() == other.conflicts.tolist()


@pytest.mark.parametrize("method", ["joint", "uw", "dwa", "pcgrad", "mgda"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_map_equal_one_process(ranks: Ranks, name: str, method: str) -> None:
    ranks.run(_check_step, name, method, {}, False)


@pytest.mark.parametrize("options", [{"memory": "sketch"}, {"every": 2}, {"every": 3, "memory": "sketch"}])
@pytest.mark.parametrize("method", ["joint", "uw"])
@pytest.mark.parametrize("wrap", [False, True])
def test_options_and_wrapped_models(ranks: Ranks, method: str, options: dict[str, object], wrap: bool) -> None:
    ranks.run(_check_step, "CatAndStack", method, options, wrap)


@pytest.mark.parametrize("method", ["joint", "cagrad"])
def test_a_wrapped_model_with_task_gradients(ranks: Ranks, method: str) -> None:
    ranks.run(_check_step, "TransformerEncoder", method, {}, True)


@pytest.mark.parametrize(("method", "memory"), [("joint", "exact"), ("joint", "sketch"), ("pcgrad", "exact")])
def test_chosen_layers_and_units_of_a_wrapped_model(ranks: Ranks, method: str, memory: str) -> None:
    options = {"exclude": "first", "units": r"layers\.\d", "memory": memory}
    ranks.run(_check_step, "TransformerEncoder", method, options, True)


def _check_step(rank: int, name: str, method: str, options: dict[str, object], wrap: bool) -> None:
    expected, oracle = alone(fresh(name), name, method, **options)
    model = fresh(name)
    ddp = DistributedDataParallel(model) if wrap else model
    chosen, profiler = recon.methods.parse(method), Profiler(ddp, **options)
    chosen.setup(TASKS)
    for step in range(STEPS):
        model.zero_grad()
        recon.backward(losses_of(ddp, shards(name, step)[rank]), ddp, chosen, profiler=profiler)
        found = [p.grad for p in [*model.parameters(), *chosen.parameters()] if p.grad is not None]
        for ours, theirs in zip(found, expected[step], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert_same_map(profiler, oracle)


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
@pytest.mark.parametrize("mode", ["fan", "per-task"])
def test_a_branched_model(ranks: Ranks, method: str, mode: str) -> None:
    ranks.run(_check_branched, method, mode)


WRAPPERS = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]
METHODS = ["joint", "joint:weights=0.5/1/1.5", "uw", "nash-mtl", "mgda", "gradnorm"]


@pytest.mark.parametrize("options", WRAPPERS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("form", ["one", "several", "unused", "waits"])
def test_methods_on_a_wrapped_model(ranks: Ranks, form: str, options: dict[str, bool]) -> None:
    """One forward or one for each task, heads that a step does not use, and gradients accumulated under no_sync."""
    if form == "waits" and options.get("static_graph"):
        pytest.skip("which torch itself cannot do under no_sync")
    ranks.run(_check_wrapped, form, options)


def _check_wrapped(rank: int, form: str, options: dict[str, bool]) -> None:
    for method in METHODS:
        one = Chooses()
        many = DistributedDataParallel(Chooses(), **options)
        chosen = [recon.methods.parse(method) for _ in range(2)]
        profilers = [Profiler(model) if method == "joint" and form != "waits" else None for model in (one, many)]
        for each in chosen:
            each.setup(TASKS)
            each.double()
        for number in range(4):
            batches = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            whole = batches.flatten(0, 1)
            with one_process():
                recon.backward(one.losses(one, whole, form), one, chosen[0], profiler=profilers[0])
            waits = many.no_sync() if form == "waits" and number % 2 == 0 else nullcontext()
            with waits:
                losses = many.module.losses(many, batches[rank], form)
                recon.backward(losses, many, chosen[1], profiler=profilers[1])
            if isinstance(waits, nullcontext):
                for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
                    assert (ours.grad is None) == (theirs.grad is None)
                    if theirs.grad is not None:
                        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9, msg=method)
                one.zero_grad()
                many.zero_grad()
        if profilers[0] is not None:
            assert_same_map(profilers[1], profilers[0])


class Chooses(nn.Module):
    """Runs the heads that it is asked for; the losses of a batch are means over its samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})
        self.double()

    def forward(self, x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        h = self.body(x)
        return {task: self.heads[task](h) for task in tasks}

    def losses(self, model: nn.Module, x: Tensor, form: str) -> dict[str, Tensor]:
        tasks = TASKS[:2] if form == "unused" else TASKS
        forwards = [(task,) for task in tasks] if form == "several" else [tasks]
        outputs = {task: out for some in forwards for task, out in model(x, some).items()}
        return {task: loss_of(outputs, task) for task in tasks}


def test_sharded_models_are_refused_by_name(ranks: Ranks) -> None:
    ranks.run(_check_sharded)


def _check_sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plan = recon.BranchPlan.per_task(["body.0"], TASKS)

    def everywhere(model: nn.Module) -> nn.Module:
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def in_part(model: nn.Module) -> nn.Module:
        fully_shard(model.body, mesh=mesh)
        return model

    def replicated(model: nn.Module) -> nn.Module:
        weight = model.body[0].weight
        model.body[0].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
        return model

    def branched(model: nn.Module) -> nn.Module:
        model = recon.convert(model, plan, torch.randn(2, 6).double())
        branches = [name for name, part in model.body[0].named_modules() if isinstance(part, nn.Linear)]
        return parallelize_module(model, mesh, {f"body.0.{name}": ColwiseParallel() for name in branches})

    kinds = {
        r"The model is sharded over processes \(fully_shard\)": everywhere,
        r"Module 'body' is sharded over processes \(fully_shard\)": in_part,
        r"The model is sharded over processes \(FullyShardedDataParallel\)": lambda model: FullyShardedDataParallel(
            model, device_id=torch.device("cpu")
        ),
        r"Parameter 'body.0.weight' is a DTensor": lambda model: parallelize_module(
            model, mesh, {"body.0": ColwiseParallel()}
        ),
        r"Parameter 'body.0.weight' is a DTensor,": replicated,
        r"Parameter 'body.0.branches": branched,
    }
    for words, shard in kinds.items():
        model = shard(Chooses())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = {task: torch.ones((), requires_grad=True) * 1 for task in TASKS}
        uses = [
            lambda model=model: recon.Profiler(model),
            lambda model=model, optimizer=optimizer: recon.train(model, [], {}, optimizer=optimizer),
            lambda model=model, optimizer=optimizer: recon.profile(model, [], {}, optimizer=optimizer),
            lambda model=model: recon.convert(model, plan, torch.randn(2, 6).double()),
        ]
        for method in (None, "joint", "uw", "mgda"):
            chosen = None if method is None else recon.methods.get(method)
            uses.append(lambda model=model, chosen=chosen, losses=losses: recon.backward(losses, model, chosen))
        for use in uses:
            with pytest.raises(UsageError, match=words + ".*DistributedDataParallel"):
                use()


def _check_branched(rank: int, method: str, mode: str) -> None:
    one, many = (branch("CatAndStack", mode=mode) for _ in range(2))
    batches = shards("CatAndStack")
    parts = [losses_of(one, batch) for batch in batches]
    with one_process():
        recon.backward({t: sum(p[t] for p in parts) / len(parts) for t in TASKS}, one, recon.methods.get(method))
    recon.backward(losses_of(many, batches[rank]), many, recon.methods.get(method))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["joint:weights=0.5/1/1.5", "uw+mgda"])
@pytest.mark.parametrize("wrap", [False, True])
def test_static_weights_and_compositions(ranks: Ranks, method: str, wrap: bool) -> None:
    ranks.run(_check_step, "CatAndStack", method, {"every": 2}, wrap)


@pytest.mark.parametrize("tasks", [(TASKS, TASKS), (("b", "a"), ("a", "c"))])
@pytest.mark.parametrize("method", ["gradnorm", "gradnorm+mgda"])
def test_norms_of_gradients(ranks: Ranks, method: str, tasks: tuple[tuple[str, ...], ...]) -> None:
    ranks.run(_check_norms, method, tasks)


def _check_norms(rank: int, method: str, tasks: tuple[tuple[str, ...], ...]) -> None:
    name = "CatAndStack"
    one, many = fresh(name), fresh(name)
    chosen, oracle = (recon.methods.get(method) for _ in range(2))
    for each in (chosen, oracle):
        each.setup(TASKS)
        each.double()

    def squares(model: nn.Module, part: int) -> dict[str, Tensor]:
        outputs = model(shards(name)[part])
        return {task: outputs[task].square().sum(1).mean() for task in tasks[part]}

    for _ in range(3):
        parts = [squares(one, part) for part in range(2)]
        losses = {task: sum(p[task] for p in parts if task in p) / len(parts) for task in dict.fromkeys(sum(tasks, ()))}
        for model in (one, many):
            model.zero_grad()
        with one_process():
            expected = recon.backward(losses, one, oracle)
        weights = recon.backward(squares(many, rank), many, chosen)
        assert {t: w.item() for t, w in weights.items()} == pytest.approx({t: w.item() for t, w in expected.items()})
        for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for parameter in [*many.parameters(), *one.parameters()]:
                parameter -= 0.01 * parameter.grad
    assert any(weight.item() != 1 for weight in weights.values())


class OnDemand(nn.Module):
    """Runs the head that is asked for; nobody asks for the spare one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in (*TASKS, "spare")})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.body(x))


@pytest.mark.parametrize(
    ("method", "profiled"),
    [("joint", False), ("joint", True), ("uw", False), ("uw", True), ("pcgrad", False), ("pcgrad", True)],
)
def test_several_forwards_a_step_and_heads_that_are_not_used(ranks: Ranks, method: str, profiled: bool) -> None:
    ranks.run(_check_several_forwards, method, profiled)


def _check_several_forwards(rank: int, method: str, profiled: bool) -> None:
    """Each task has a batch and a forward of its own, as data sets that are labelled for one task each want it."""
    torch.manual_seed(0)
    one, many = OnDemand().double(), OnDemand().double()
    many.load_state_dict(one.state_dict())
    ddp = DistributedDataParallel(many, find_unused_parameters=True)
    chosen, oracle = (recon.methods.get(method) for _ in range(2))
    for each in (chosen, oracle):
        each.setup(TASKS)
        each.double()
    profilers = (Profiler(ddp), Profiler(one)) if profiled else (None, None)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (many, one)]
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        batches = {task: torch.randn(2, 3, 6, generator=draw, dtype=torch.float64) for task in TASKS}
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = {task: (ddp(x[rank], task) - 1).square().mean() for task, x in batches.items()}
        recon.backward(losses, ddp, chosen, profiler=profilers[0])
        with one_process():
            losses = {task: (one(x.flatten(0, 1), task) - 1).square().mean() for task, x in batches.items()}
            recon.backward(losses, one, oracle, profiler=profilers[1])
        for (name, ours), theirs in zip(many.named_parameters(), one.parameters(), strict=True):
            assert (theirs.grad is None) == name.startswith("heads.spare"), name
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    if profiled:
        assert_same_map(*profilers)


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_a_task_that_one_rank_lacks(ranks: Ranks, memory: str) -> None:
    ranks.run(_check_missing_task, memory)


def _check_missing_task(rank: int, memory: str) -> None:
    name = "CatAndStack"
    one, many = fresh(name), fresh(name)
    batches = shards(name)
    tasks = [("b", "a"), ("a", "c")]  # in another order, too
    parts = [losses_of(one, batch, has) for batch, has in zip(batches, tasks, strict=True)]
    losses = {task: sum(part[task] for part in parts if task in part) / len(parts) for task in ("b", "a", "c")}
    profiler, oracle = Profiler(many, memory=memory), Profiler(one)
    with one_process():
        oracle.backward(losses)
    profiler.backward(losses_of(many, batches[rank], tasks[rank]))
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert_same_map(profiler, oracle)


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_rank_without_any_target(ranks: Ranks, method: str, every: int) -> None:
    ranks.run(_check_idle_rank, method, every)


def _check_idle_rank(rank: int, method: str, every: int) -> None:
    name = "CatAndStack"
    one, many = fresh(name), fresh(name)
    inputs = shards(name)[0]
    profiler, chosen = Profiler(many, every=every), recon.methods.get(method)
    chosen.setup(TASKS)
    for _ in range(2):
        one.zero_grad()
        many.zero_grad()
        with one_process():
            halves = {task: loss / 2 for task, loss in losses_of(one, inputs).items()}
            recon.backward(halves, one, recon.methods.get(method))
        losses = losses_of(many, inputs) if rank == 0 else {}
        recon.backward(losses, many, chosen, profiler=profiler)
    if method == "joint":  # which draws nothing
        for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    states = [p.grad.clone() for p in many.parameters()]
    average_(states)
    assert all(torch.allclose(p.grad, mean) for p, mean in zip(many.parameters(), states, strict=True))


@pytest.mark.parametrize(
    "method", [None, "pcgrad", "joint", recon.methods.get("pcgrad"), recon.methods.get("uw")], ids=repr
)
@pytest.mark.parametrize("first", [(), TASKS[:1]])
def test_a_first_step_without_some_losses_on_one_rank(
    ranks: Ranks, method: str | Method | None, first: tuple[str, ...]
) -> None:
    """A method that nobody has set up learns of the same tasks on all ranks."""
    ranks.run(_check_first_step, method, first, seconds=120)


def _check_first_step(rank: int, method: str | Method | None, first: tuple[str, ...]) -> None:
    model, inputs = fresh("CatAndStack"), shards("CatAndStack")[0]
    with pytest.raises(UsageError, match=r"needs the names of all tasks, each once, but got \[\]"):
        recon.backward({}, model, method)
    for tasks in (first, TASKS):
        every = losses_of(model, inputs)
        model.zero_grad()
        recon.backward(every if rank == 0 else {task: every[task] for task in tasks}, model, method)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        means = [gradient.clone() for gradient in found]
        average_(means)
        assert found and all(torch.allclose(ours, mean) for ours, mean in zip(found, means, strict=True))
    if isinstance(method, Method):
        assert method.tasks == tuple(losses_of(model, inputs))


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_a_later_step_with_a_task_that_one_rank_lacks(ranks: Ranks, method: str) -> None:
    """A method by its name is made anew for a task that comes later, on all ranks."""
    ranks.run(_check_later_task, method, seconds=120)


def _check_later_task(rank: int, method: str) -> None:
    model, inputs = fresh("CatAndStack"), shards("CatAndStack")[0]
    for tasks in (TASKS[:1], TASKS if rank == 0 else TASKS[:1], TASKS if rank else ()):
        recon.backward(losses_of(model, inputs, tasks), model, method)


def test_a_gradient_that_is_not_finite_on_one_rank(ranks: Ranks) -> None:
    ranks.run(_check_non_finite)


def _check_non_finite(rank: int) -> None:
    model = fresh("CatAndStack")
    profiler = Profiler(model)
    for scale in (1.0, float("nan") if rank else 1.0):
        losses = losses_of(model, shards("CatAndStack")[rank])
        profiler.backward({**losses, "a": losses["a"] * scale})
    cmap = profiler.conflict_map()
    assert (cmap.steps, cmap.skipped) == (2, 1)


def test_what_the_ranks_share(ranks: Ranks) -> None:
    ranks.run(_check_sharing)


def _check_sharing(rank: int) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model(torch.randn(4, 2))
    broadcast_model(model)
    mine = [t.clone() for t in model.state_dict().values() if t.is_floating_point()]
    average_(mine)
    assert all(torch.equal(a, b) for a, b in zip(mine, [t for t in model.state_dict().values() if t.ndim], strict=True))
    unequal = [torch.tensor([rank + 1.0]), torch.ones(2, 2).T * rank, torch.tensor(rank, dtype=torch.float64)]
    average_(unequal)
    assert [t.tolist() for t in unequal] == [[1.5], [[0.5, 0.5], [0.5, 0.5]], 0.5]
    losses = {"a": torch.tensor(3.0 + rank), **({"b": torch.tensor(5.0)} if rank == 0 else {})}
    means = average_losses(losses, ["a", "b"], torch.device("cpu"))
    assert {task: mean.item() for task, mean in means.items()} == {"a": 3.5, "b": 5.0}  # of those that have one
    loader = [(torch.arange(5), {"a": torch.arange(5) + 10, "b": None}), (torch.arange(1), {"a": torch.zeros(1)})]
    seen = [(x.tolist(), y["a"].tolist()) for x, y in RankBatches(loader)]
    assert seen == [([0, 1], [10, 11])] if rank == 0 else seen == [([2, 3], [12, 13])]
    with pytest.raises(ProblemError, match="cannot be shared out over several processes"):
        list(RankBatches([("text", {"a": torch.zeros(4)})]))


@pytest.mark.parametrize("form", ["whole", "joint", "gathered"])
@pytest.mark.parametrize("method", ["joint", "dwa", "pcgrad"])
def test_a_training_of_several_ranks(ranks: Ranks, method: str, form: str) -> None:
    ranks.run(_check_training, method, form)


def _check_training(rank: int, method: str, form: str) -> None:
    losses = dict.fromkeys(TASKS, lambda out, target: (out.mean(1) - target).square().mean())
    draw = torch.Generator().manual_seed(0)
    loader = [(torch.cat(shards("CatAndStack", step)), torch.randn(6, generator=draw).double()) for step in range(5)]
    whole = [(x, dict.fromkeys(TASKS, y)) for x, y in loader]
    torch.manual_seed(rank)
    one, many = fresh("CatAndStack"), fresh("CatAndStack")
    if rank:
        for parameter in many.parameters():  # rank 0's is what counts
            torch.nn.init.ones_(parameter)
    with one_process():
        expected = recon.train(one, whole, losses, optimizer=sgd(one), method=method, epochs=2)
    batches = whole
    if form == "joint":
        batches = [{task: (x, y) for task, y in targets.items()} for x, targets in whole]
    elif form == "gathered":
        batches = [(x, {task: y}) for x, targets in whole for task, y in targets.items()]
    history = recon.train(
        many,
        RankBatches(batches),
        losses,
        optimizer=sgd(many),
        method=method,
        epochs=2,
        accumulate="tasks" if form == "gathered" else 1,
    )
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(history.epochs, expected.epochs, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.weights == pytest.approx(theirs.weights, rel=1e-6)


class Hears(recon.methods.Joint):
    needs_new_losses = True

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, float]] = []

    def after_step(self, losses: Mapping[str, torch.Tensor]) -> None:
        self.heard.append({task: loss.item() for task, loss in losses.items()})


def test_what_a_step_did_to_the_losses_is_told_alike_on_all_ranks(ranks: Ranks) -> None:
    ranks.run(_check_new_losses)


def _check_new_losses(rank: int) -> None:
    losses = dict.fromkeys(TASKS, lambda out, target: (out.mean(1) - target).square().mean())
    x, y = torch.cat(shards("CatAndStack", 0)), torch.ones(6).double()
    one, many, first = fresh("CatAndStack"), fresh("CatAndStack"), TASKS[0]
    alone, hears = Hears(), Hears()
    with one_process():
        recon.train(one, [(x, dict.fromkeys(TASKS, y))] * 2, losses, optimizer=sgd(one), method=alone)
    targets = [dict.fromkeys(TASKS, y), {task: y for task in TASKS if rank == 0 or task != first}]
    recon.train(many, RankBatches([(x, t) for t in targets]), losses, optimizer=sgd(many), method=hears)
    assert hears.heard[0] == pytest.approx(alone.heard[0], rel=1e-9)
    assert gather(hears.heard) == [hears.heard] * 2 and list(hears.heard[1]) == list(TASKS)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def test_ranks_with_other_models_are_told_so(ranks: Ranks) -> None:
    ranks.run(_check_other_models)


def _check_other_models(rank: int) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(rank + 1)])
    out = model(torch.ones(1, 2))
    with pytest.raises(UsageError, match=r"The ranks' models have \[2, 4\] parameters"):
        Profiler(model).backward({"a": out.sum(), "b": out.square().sum()})


def test_one_process_needs_no_group() -> None:
    tensors = [torch.ones(2)]
    average_(tensors)
    broadcast_model(fresh("CatAndStack"))
    assert tensors[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("method", "options"),
    [("joint", None), ("uw", None), *itertools.product(["joint", "uw"], [{}, {"memory": "sketch"}]), ("pcgrad", {})],
    ids=str,
)
def test_sparse_gradients_equal_those_of_one_process(ranks: Ranks, method: str, options: dict[str, str] | None) -> None:
    ranks.run(_check_sparse, method, options)


def _check_sparse(rank: int, method: str, options: dict[str, str] | None) -> None:
    """The ranks look up other rows, and one lacks a task, and with it the table that is this task's own."""
    model, whole = sparse.make(True), sparse.make(False)
    made, alone = recon.methods.parse(method), recon.methods.parse(method)
    profiler, expected = (None if options is None else Profiler(m, **options) for m in (model, whole))
    for ids in sparse.batches(3):
        parts = [sparse.losses_of(whole, ids[:4]), sparse.losses_of(whole, ids[4:])]
        del parts[1]["c"]
        model.zero_grad()
        losses = sparse.losses_of(model, ids[4 * rank : 4 * rank + 4])
        recon.backward({task: losses[task] for task in parts[rank]}, model, made, profiler=profiler)
        assert sparse.sparse_ones(model) == {"words.weight", "bag.weight", "own.weight"}
        whole.zero_grad()
        with one_process():
            mean = {task: sum(part[task] for part in parts if task in part) / 2 for task in TASKS}
            recon.backward(mean, whole, alone, profiler=expected)
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.to_dense(), theirs.grad, msg=name)
    if profiler is not None and expected is not None:
        assert_same_map(profiler, expected)
