"""The noise floor: each task against itself, and each pair, on two batches at the same weights."""

import copy
import math
from contextlib import suppress

import pytest
import torch
from scipy.stats import beta
from torch import nn

import recon
from recon.errors import GradientError, UsageError
from recon.methods.composition import Composition
from recon.profiling.profiler import Profiler
from recon.profiling.tally import Tally

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """Smooth; `own` has a bias that task c alone reaches, in a layer whose weight all share."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.wide = nn.Linear(6, 500)  # more numbers than a sketch holds
        self.own = nn.Linear(500, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in TASKS})

    def forward(self, x):
        hidden = torch.tanh(self.wide(torch.tanh(self.first(x)))) @ self.own.weight.T
        inputs = {"a": hidden, "b": hidden, "c": hidden + self.own.bias}
        return {task: head(torch.tanh(inputs[task])) for task, head in self.heads.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double()


def losses(model, seed, tasks=TASKS):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
    targets = {task: torch.randn(8, 2, generator=draw, dtype=torch.float64) for task in TASKS}
    out = model(x)
    return {task: (out[task] - targets[task]).square().mean() for task in tasks}


def gradients(model, losses):
    """{task: {layer: float64 gradient}} by a full backward pass for each task."""
    found = {}
    for task, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        found[task] = {
            name: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in layer])
            for name, layer in ((n, list(getattr(model, n).parameters())) for n in ("first", "wide", "own"))
        }
    model.zero_grad()
    return found


@pytest.fixture
def counted(monkeypatch):
    """What the tally is given: (layers, tasks, products, norms, second norms) of each floor."""
    calls = []
    monkeypatch.setattr(Tally, "add_floor", lambda _, *found: calls.append(found), raising=False)
    return calls


def train(model, order, steps=3, *, method=None, memory="exact", tasks=TASKS, second_tasks=TASKS):
    """A loop of one's own, with a floor in every step."""
    profiler = Profiler(model, tasks=TASKS, memory=memory)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        if order == "before":
            profiler.floor(losses(model, 100 + step, second_tasks))
        recon.backward(losses(model, step, tasks), model, method, profiler=profiler)
        if order == "after":
            profiler.floor(losses(model, 100 + step, second_tasks))
        optimizer.step()
    return profiler


def cosines(found):
    _, _, products, norms, second = found
    return products / (norms[:, :, None] * second[:, None, :])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_products_are_those_of_autograd_on_the_two_batches(model, counted, order, memory):
    first, second = (gradients(model, losses(model, seed)) for seed in (0, 100))
    profiler = train(model, order, steps=1, memory=memory)
    [(layers, tasks, products, norms, second_norms)] = counted
    assert [profiler.layers[i].name for i in layers] == ["first", "wide", "own"]
    assert list(tasks) == [0, 1, 2]
    for place, name in enumerate(("first", "wide", "own")):
        u, v = (torch.stack([batch[task][name] for task in TASKS]) for batch in (first, second))
        # Exact up to the order of summation; a sketch's cosine errs by 1 / sqrt(its size), once in a wide layer.
        size = 1e-12 if memory == "exact" or u.shape[1] <= 2039 else 5 / math.sqrt(2039)
        expected = (u @ v.T) / (u.norm(dim=1)[:, None] * v.norm(dim=1)[None, :])
        found = products[place] / (norms[place][:, None] * second_norms[place][None, :])
        # float32 sketches of float64 gradients
        torch.testing.assert_close(found, expected, rtol=0, atol=size if memory == "exact" else max(size, 1e-5))
    assert products.dtype == torch.float64


@pytest.mark.parametrize("memory", ["exact", "sketch"])
@pytest.mark.parametrize("tasks", [(TASKS, TASKS), (("a", "b"), ("b", "c"))], ids=["same tasks", "b in common"])
def test_before_and_after_the_step_count_the_same(model, counted, memory, tasks):
    first, second = tasks
    for order in ("before", "after"):
        train(copy.deepcopy(model), order, memory=memory, tasks=first, second_tasks=second)
    before, after = counted[:3], counted[3:]
    assert len(after) == 3
    for one, other in zip(before, after, strict=True):
        assert one[:2] == other[:2]
        for left, right in zip(one[2:], other[2:], strict=True):
            assert torch.equal(left, right)


def test_tasks_in_common_are_compared(model, counted):
    train(model, "before", steps=1, tasks=("a", "b"), second_tasks=("b", "c"))
    [(_, tasks, products, norms, second)] = counted
    assert list(tasks) == [0, 1]  # of the step
    assert (norms > 0).all()
    assert (second[:, 0] == 0).all()
    assert (second[:, 1] > 0).all()
    assert (products[:, :, 0] == 0).all()
    assert (products[:, :, 1] != 0).all()


@pytest.mark.parametrize("order", ["before", "after"])
def test_no_task_in_common_is_refused(model, order):
    with pytest.raises(UsageError, match=r"tasks c; the step has a, b\. Give profiler\.floor a second batch"):
        train(model, order, steps=1, tasks=("a", "b"), second_tasks=("c",))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_a_floor_changes_neither_weights_nor_gradients(model, counted, order, memory):
    plain, floored = copy.deepcopy(model), copy.deepcopy(model)
    train(plain, "never", memory=memory)
    train(floored, order, memory=memory)
    assert len(counted) == 3
    for ours, theirs in zip(floored.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)


def test_the_graph_is_freed_and_grad_is_none_as_before(model, counted):
    profiler = Profiler(model)
    second = losses(model, 100)
    profiler.floor(second)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        second["a"].backward()


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda", "graddrop"])
def test_a_floor_before_the_step_holds_with_any_method(model, counted, method):
    """Against a loop that takes each step's gradients from autograd itself."""
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    train(model, "before", method=recon.methods.get(method))
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    one = recon.methods.get(method)
    for step, found in enumerate(counted):
        first, second = (gradients(twin, losses(twin, seed)) for seed in (step, 100 + step))
        u, v = (torch.stack([batch[task]["first"] for task in TASKS]) for batch in (first, second))
        expected = (u @ v.T) / (u.norm(dim=1)[:, None] * v.norm(dim=1)[None, :])
        torch.testing.assert_close(cosines(found)[0], expected, rtol=0, atol=1e-9)
        recon.backward(losses(twin, step), twin, one)
        optimizer.step()


def test_a_method_that_changes_its_gradients_needs_the_floor_before(model, counted):
    method = Composition(recon.methods.get("uw"), recon.methods.get("graddrop"))
    train(copy.deepcopy(model), "before", method=method)
    assert len(counted) == 3
    method = Composition(recon.methods.get("uw"), recon.methods.get("graddrop"))
    with pytest.raises(UsageError, match="only before it with a method that changes the gradients"):
        train(model, "after", method=method)


def test_a_floor_without_its_step_is_refused_when_the_next_begins(model, counted):
    profiler = Profiler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    profiler.floor(losses(model, 100))
    sum(losses(model, 0).values()).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"weights have changed since profiler\.floor was called"):
        profiler.backward(losses(model, 1))
    optimizer.zero_grad()
    profiler.backward(losses(model, 1))  # and the training can go on
    assert profiler.steps == 1
    assert not counted


def test_a_floor_alone_is_no_profile(model, counted):
    profiler = Profiler(model)
    profiler.floor(losses(model, 100))
    with pytest.raises(UsageError, match="Nothing was profiled yet"):
        profiler.conflict_map()


def test_two_floors_before_one_step_are_refused(model, counted):
    profiler = Profiler(model)
    profiler.floor(losses(model, 100))
    with pytest.raises(UsageError, match=r"has a floor already\. Call .* once a step"):
        profiler.floor(losses(model, 101))


def test_two_floors_after_one_step_are_refused(model, counted):
    profiler = Profiler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    profiler.backward(losses(model, 0))
    profiler.floor(losses(model, 100))
    profiler.floor(losses(model, 101))  # it may be for a further batch at these weights
    optimizer.step()
    with pytest.raises(UsageError, match="once a step"):
        profiler.backward(losses(model, 1))
    assert len(counted) == 1


def test_batches_gathered_before_one_optimizer_step_may_each_have_a_floor(model, counted):
    for order in ("before", "after"):
        profiler = Profiler(model)
        for batch in range(3):
            if order == "before":
                profiler.floor(losses(model, 100 + batch))
            profiler.backward(losses(model, batch))
            if order == "after":
                profiler.floor(losses(model, 100 + batch))
    assert len(counted) == 6
    for before, after in zip(counted[:3], counted[3:], strict=True):
        assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_floor_of_a_step_that_is_not_profiled_is_left_out(model, counted, order):
    profiler = Profiler(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        if order == "before":
            profiler.floor(losses(model, 100 + step))
        profiler.backward(losses(model, step))
        if order == "after":
            profiler.floor(losses(model, 100 + step))
        optimizer.step()
    assert (profiler.steps, len(counted)) == (2, 2)


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_a_joint_batch_runs_one_forward_after_the_other(model, counted, memory):
    """As one forward of all tasks; a task may have several batches, and each graph is freed before the next."""

    def passes():
        earlier = []
        for parts in ({"a": 1}, {"b": 1, "c": 0.25}, {"c": 0.75}):
            for loss in earlier:
                with pytest.raises(RuntimeError, match="second time"):
                    loss.backward()
            found = {task: parts[task] * loss for task, loss in losses(model, 100, parts).items()}
            earlier = list(found.values())
            yield found

    for second in (losses(model, 100), passes()):
        profiler = Profiler(model, memory=memory)
        profiler.floor_of_next_step(second)
        profiler.backward(losses(model, 0))
    one, other = counted
    assert one[:2] == other[:2]
    for left, right in zip(one[2:], other[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 if memory == "sketch" else 1e-12)


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_a_window_takes_floors_before_amid_and_after_its_tasks(model, counted, memory):
    for when in ("before", "amid", "after", "in backward"):
        profiler = Profiler(model, tasks=TASKS, memory=memory)
        window = recon.Window(model, profiler=profiler, tasks=TASKS)
        for step in range(2):
            model.zero_grad()
            second = {task: losses(model, 100 + step)[task] for task in TASKS}  # a graph for each
            if when in ("before", "in backward"):
                profiler.floor(second)
            if when == "in backward":
                profiler.backward(losses(model, step))
                continue
            for task in TASKS:
                if when == "amid" and task == "b":
                    profiler.floor(second)
                window.add(task, losses(model, step)[task])
            window.step()
            if when == "after":
                profiler.floor(second)
    assert len(counted) == 8
    for others in (counted[:2], counted[2:4], counted[4:6]):
        for one, other in zip(others, counted[6:], strict=True):
            assert one[:2] == other[:2]
            for left, right in zip(one[2:], other[2:], strict=True):
                torch.testing.assert_close(left, right, rtol=0, atol=1e-6 if memory == "sketch" else 1e-12)


def test_bad_losses_are_refused(model):
    profiler = Profiler(model)
    with pytest.raises(UsageError, match="must be a scalar tensor"):
        profiler.floor({"a": torch.ones(2, requires_grad=True)})
    with pytest.raises(UsageError, match="losses is empty"):
        profiler.floor({})
    with pytest.raises(GradientError, match="depends on no trainable parameter"):
        profiler.floor({"a": torch.ones((), requires_grad=True)})


class Vectors(nn.Module):
    """A gradient of one's choice: the loss of a task is the product of the weight with a vector."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))


@pytest.mark.parametrize("threshold", [-0.1, -0.3, 0.0])
def test_pure_noise_has_the_floor_of_random_vectors_and_a_deterministic_task_has_none(counted, threshold):
    steps, size = 600, 12
    draw = torch.Generator().manual_seed(5)
    model = Vectors(size)
    profiler = Profiler(model, threshold)
    fixed = torch.randn(size, generator=draw, dtype=torch.float64)

    def noisy():
        noise = torch.randn(size, generator=draw, dtype=torch.float64)
        return {"noise": model.weight @ noise, "fixed": model.weight @ fixed}

    for _ in range(steps):
        profiler.floor(noisy())
        profiler.backward(noisy())
    shares = torch.stack([cosines(found)[0] < threshold for found in counted]).double().mean(dim=0)
    # Of two independent Gaussian vectors, (1 + cos) / 2 has the distribution Beta((d - 1) / 2, (d - 1) / 2).
    expected = beta.cdf((1 + threshold) / 2, (size - 1) / 2, (size - 1) / 2)
    four_deviations = 4 * math.sqrt(expected * (1 - expected) / steps)
    assert abs(shares[0, 0] - expected) < four_deviations
    assert abs(shares[0, 1] - expected) < four_deviations  # a fixed vector against noise
    assert shares[1, 1] == 0


def test_a_gradient_that_is_not_finite_is_handed_on_as_such(model, counted):
    profiler = Profiler(model)
    with suppress(GradientError):
        profiler.floor({task: loss * math.inf for task, loss in losses(model, 100).items()})
        profiler.backward(losses(model, 0))
    [(_, _, _, norms, second)] = counted
    assert norms.isfinite().all()
    assert not second.isfinite().any()


class Tables(nn.Module):
    """Two tables, whose gradients are sparse or not, and a shared layer."""

    def __init__(self, sparse):
        super().__init__()
        self.items = nn.Embedding(30, 3, sparse=sparse)
        self.own = nn.Embedding(20, 3, sparse=sparse)  # task a alone
        self.mix = nn.Linear(3, 2)

    def forward(self, items, others):
        hidden = torch.tanh(self.mix(self.items(items)))
        return {"a": hidden.sum(1) + self.own(others).sum(1), "b": hidden.square().sum(1)}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_sparse_gradients_meet_in_the_rows_that_both_batches_touched(counted, order, memory):
    def losses_of(model, seed):
        draw = torch.Generator().manual_seed(seed)
        items = torch.randint(30, (12,), generator=draw)
        out = model(items, torch.randint(20, (12,), generator=draw))
        weights = torch.randn(12, generator=draw, dtype=torch.float64)
        return {task: (value * weights).sum() for task, value in out.items()}

    for sparse in (True, False):
        torch.manual_seed(0)
        model = Tables(sparse).double()
        profiler = Profiler(model, memory=memory)
        if order == "before":
            profiler.floor(losses_of(model, 1))
        profiler.backward(losses_of(model, 0))
        if order == "after":
            profiler.floor(losses_of(model, 1))
        assert model.items.weight.grad.is_sparse == sparse
    sparsely, densely = counted
    assert sparsely[:2] == densely[:2]
    assert [profiler.layers[i].name for i in sparsely[0]] == ["items", "mix"]
    assert (sparsely[2] != 0).all()
    for left, right in zip(sparsely[2:], densely[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12 if memory == "exact" else 1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_table_that_is_sparse_in_one_of_the_batches(counted, first, second):
    """`sparse` may be switched between two forwards; a task may be the only one to reach the table in one of them."""

    def losses_of(model, seed, sparse, tasks):
        draw = torch.Generator().manual_seed(seed)
        model.items.sparse = sparse
        out = model(torch.randint(30, (12,), generator=draw), torch.randint(20, (12,), generator=draw))
        return {task: out[task].square().sum() for task in tasks}

    found = []
    for kinds in ((first, second), (False, False)):
        torch.manual_seed(0)
        model = Tables(False).double()
        profiler = Profiler(model, tasks=("a", "b"))
        profiler.backward(losses_of(model, 0, kinds[0], "ab"))
        profiler.floor(losses_of(model, 1, kinds[1], "b"))
        found.append(counted[-1])
    assert (found[0][2][:, :, 1] != 0).all()
    for left, right in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
