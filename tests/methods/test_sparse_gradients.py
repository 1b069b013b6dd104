"""Sparse gradients: what a model with sparse tables does is what the same model does with sparse=False."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recon
from recon.errors import UsageError
from recon.methods.gradients.cross_gramians import cross_gramians
from recon.methods.gradients.jacobian import Workspace, task_jacobian
from recon.methods.gradients.sparse import meeting
from recon.profiling.profiler import Profiler

TASKS = ("a", "b", "c")
ROWS, WIDTH = 40, 3
METHODS = [name for name in recon.methods.names() if name not in ("rotograd", "excessmtl", "graddrop")]


class Tables(nn.Module):
    """A table that all tasks read, one of two of them, by a bag, and one of one alone; `c` reads other rows."""

    def __init__(self, sparse: bool, rows: int = ROWS) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, WIDTH, sparse=sparse)
        self.bag = nn.EmbeddingBag(rows, WIDTH, mode="mean", sparse=sparse)
        self.own = nn.Embedding(rows, WIDTH, sparse=sparse)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in TASKS})

    def forward(self, ids):
        both = torch.tanh(self.body(self.words(ids[:, 0]) + self.bag(ids)))
        other = torch.tanh(self.body(self.words(ids[:, 1]) + self.own(ids[:, 2])))
        return {task: self.heads[task](other if task == "c" else both) for task in TASKS}


def losses_of(model, ids):
    return {task: (out - k).square().mean() for k, (task, out) in enumerate(model(ids).items())}


def make(sparse, **options):
    torch.manual_seed(0)
    return Tables(sparse, **options).double()


def batches(count, rows=ROWS):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(rows, (8, 3), generator=draw) for _ in range(count)]


def trained(sparse, method, profiler=None, optimizer=torch.optim.SGD, steps=4):
    """A model, its profiler and the gradients of each step."""
    model = make(sparse)
    made, optimizer, found = recon.methods.get(method), optimizer(model.parameters(), lr=0.1), []
    made.setup(TASKS)
    profiler = None if profiler is None else Profiler(model, **profiler)
    for ids in batches(steps):
        optimizer.zero_grad()
        recon.backward(losses_of(model, ids), model, made, profiler=profiler)
        found.append({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
    return model, profiler, found


def assert_same(found, expected):
    for step, others in zip(found, expected, strict=True):
        for name, gradient in step.items():
            torch.testing.assert_close(gradient.to_dense(), others[name], atol=1e-12, rtol=1e-9)


def assert_same_map(profiler, expected):
    ours, theirs = profiler.conflict_map(), expected.conflict_map()
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.histogram.tolist() == other.histogram.tolist(), one.name
        assert one.observed.tolist() == other.observed.tolist(), one.name


def sparse_ones(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse}


@pytest.mark.parametrize("method", METHODS)
def test_scores_updates_and_weights_are_those_of_the_dense_model(method):
    model, profiler, gradients = trained(True, method, {})
    plain, expected, theirs = trained(False, method, {})
    assert_same(gradients, theirs)
    assert_same_map(profiler, expected)
    assert sparse_ones(model) == {"words.weight", "bag.weight", "own.weight"}
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", ["joint", "uw"])
def test_sketches_are_those_of_the_dense_model(method):
    model, profiler, gradients = trained(True, method, {"memory": "sketch"})
    _, expected, theirs = trained(False, method, {"memory": "sketch"})
    assert_same(gradients, theirs)
    assert_same_map(profiler, expected)
    assert sparse_ones(model) == {"words.weight", "bag.weight", "own.weight"}


def test_graddrop_keeps_the_gradients_of_one_sign_in_every_number():
    """It draws a number for each column, so that the dense model draws others."""
    model, ids = make(True), batches(1)[0]
    by_task = {}
    for task in TASKS:
        model.zero_grad()
        losses_of(model, ids)[task].backward()
        by_task[task] = None if model.words.weight.grad is None else model.words.weight.grad.to_dense()
    model.zero_grad()
    recon.backward(losses_of(model, ids), model, "graddrop")
    kept = model.words.weight.grad.to_dense()
    rows = torch.stack(list(by_task.values()))
    of_sign = torch.stack([rows.clamp(min=0).sum(dim=0), rows.clamp(max=0).sum(dim=0)])
    assert ((kept - of_sign).abs() < 1e-12).any(dim=0).all()
    assert (kept[rows.abs().sum(dim=0) > 0]).any() and not kept[rows.abs().sum(dim=0) == 0].any()


def test_a_method_that_keeps_something_by_column_is_refused():
    with pytest.raises(UsageError, match=r"'excessmtl' keeps a number .* 40 x 3, .* are sparse.*sparse=False"):
        trained(True, "excessmtl")


@pytest.mark.parametrize("method", ["joint", "mgda"])
def test_grad_is_sparse_where_plain_training_leaves_it_so_and_accumulates(method):
    model, plain, dense = make(True), make(True), make(False)
    for ids in batches(2):
        sum(losses_of(plain, ids).values()).backward()
        recon.backward(losses_of(model, ids), model, method)
        recon.backward(losses_of(dense, ids), dense, method)
    assert sparse_ones(model) == sparse_ones(plain)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_a_table_that_one_task_reads_as_a_whole_has_a_dense_gradient(method):
    def losses(model, ids):
        found = losses_of(model, ids)
        return found | {"b": found["b"] + model.words.weight.square().sum()}  # weight decay, say

    grads = {}
    for sparse in (True, False):
        model = make(sparse)
        profiler = Profiler(model)
        recon.backward(losses(model, batches(1)[0]), model, method, profiler=profiler)
        grads[sparse] = {name: p.grad for name, p in model.named_parameters()}
        assert sparse_ones(model) == ({"bag.weight", "own.weight"} if sparse else set())
    assert_same([grads[True]], [grads[False]])


def test_rows_of_two_kinds_are_added_up_in_a_dense_gradient():
    """Embeddings have rows, gathered numbers are alone; torch cannot add them."""
    weight, at = nn.Parameter(torch.randn(5, 4, dtype=torch.float64)), torch.tensor([1, 3])
    losses = {
        "a": nn.functional.embedding(at, weight, sparse=True).sum(),
        "b": weight.gather(0, at.view(1, 2), sparse_grad=True).sum() * 2,
    }
    recon.backward(losses, nn.ParameterList([weight]), "upgrad")
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[at] += 1
    expected[1, 0] += 2
    expected[3, 1] += 2
    torch.testing.assert_close(weight.grad, expected)  # they agree, so that the sum is right for both


def test_gathered_numbers_are_rows_of_one_number():
    weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    at = torch.tensor([[0, 3], [3, 0], [0, 3]])
    picked = weight.gather(0, at, sparse_grad=True)
    jacobian = task_jacobian({"a": picked.sum(), "b": (picked[:1] * 3).sum()}, [weight])
    assert jacobian.rows[weight].tolist() == [[0, 0, 3, 3], [0, 1, 0, 1]]
    assert jacobian.matrix.tolist() == [[2, 1, 1, 2], [3, 0, 0, 3]]
    recon.backward({"a": weight.gather(0, at, sparse_grad=True).sum()}, nn.ParameterList([weight]))
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[0, :2], expected[3, :2] = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(weight.grad.to_dense(), expected)


def test_the_columns_of_a_step_are_its_touched_rows_alone():
    model, workspace = make(True), Workspace()
    for ids in [*batches(6), batches(1)[0][:1]]:  # more and fewer columns than the step before
        jacobian = task_jacobian(losses_of(model, ids), model.parameters(), workspace)
        assert jacobian.rows[model.words.weight].tolist() == [ids[:, :2].unique().tolist()]
        assert jacobian.rows[model.bag.weight].tolist() == [ids.unique().tolist()]
        assert jacobian.matrix.shape[1] == sum(map(jacobian.width, jacobian.shared))
        dense = make(False)
        whole = task_jacobian(losses_of(dense, ids), dense.parameters())
        torch.testing.assert_close(jacobian.matrix @ jacobian.matrix.T, whole.matrix @ whole.matrix.T)


def test_rows_that_two_steps_have_in_common():
    here, there = meeting(torch.tensor([[1, 4, 6, 9]]), torch.tensor([[0, 4, 5, 6]]), torch.Size([10, 2]))
    assert (here.tolist(), there.tolist()) == ([1, 2], [1, 3])
    nowhere = torch.empty(1, 0, dtype=torch.int64)
    assert [t.tolist() for t in meeting(torch.tensor([[1]]), nowhere, torch.Size([10, 2]))] == [[], []]


def test_products_of_two_steps_are_those_of_the_dense_model():
    first, second = batches(2)
    products = []
    for sparse in (True, False):
        model = make(sparse)
        parameters = list(model.parameters())
        layer_of = {p: number for number, p in enumerate(parameters)}
        one, other = (task_jacobian(losses_of(model, ids), parameters) for ids in (first, second))
        products.append(cross_gramians(one, other, range(len(parameters)), layer_of))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("scale", [0.25, 1024.0])
@pytest.mark.parametrize("method", ["joint", "nash-mtl", "uw+pcgrad"])
def test_a_loss_scale(method, scale):
    found = []
    for sparse in (True, False):
        model, made = make(sparse), recon.methods.parse(method)
        losses = {task: scale * loss for task, loss in losses_of(model, batches(1)[0]).items()}
        recon.backward(losses, model, made, loss_scale=scale)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(found[:1], found[1:])


def test_a_scaler_skips_the_step_of_every_optimizer_after_an_overflow():
    model = make(True).float()
    tables = [model.words.weight, model.bag.weight, model.own.weight]
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    optimizers = [torch.optim.SparseAdam(tables), torch.optim.Adam(others)]
    scaler, before = torch.amp.GradScaler("cpu", init_scale=8.0), [p.clone() for p in model.parameters()]
    losses = losses_of(model, batches(1)[0])
    losses["b"] = losses["b"] * math.inf
    recon.backward({t: scaler.scale(loss) for t, loss in losses.items()}, model, "mgda", loss_scale=scaler)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(p, then) for p, then in zip(model.parameters(), before, strict=True))


class _Allocated(TorchDispatchMode):
    """The bytes of the largest memory that each operation takes anew: views of what it is given take none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage.data_ptr() for storage in _storages(args)}
        out = func(*args, **(kwargs or {}))
        new = [storage.nbytes() for storage in _storages(out) if storage.data_ptr() not in given]
        self.largest[str(func)] = max(self.largest[str(func)], *new, 0)
        return out


def _storages(structure):
    tensors = [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]
    parts = [part for t in tensors for part in ((t._indices(), t._values()) if t.is_sparse else (t,))]
    return [part.untyped_storage() for part in parts]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("joint", {}),
        ("joint", {"memory": "sketch"}),
        ("uw", {"memory": "sketch"}),
        ("pcgrad", {}),
        ("graddrop", {}),
        ("gradnorm:layer=words", {}),
    ],
    ids=str,
)
def test_nothing_of_a_tables_size_is_made(method, options):
    rows = 1_000_000
    model, made = Tables(True, rows), recon.methods.parse(method)
    profiler = Profiler(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _Allocated() as memory:
        for ids in batches(2, rows):
            optimizer.zero_grad()
            recon.backward(losses_of(model, ids), model, made, profiler=profiler)
            optimizer.step()
    allowed = 4_200_000 if options else 100_000  # a sketch's random signs, whatever the model
    assert 0 < max(memory.largest.values()) <= allowed < 4 * rows * WIDTH, memory.largest
