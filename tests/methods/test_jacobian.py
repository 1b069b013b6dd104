import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recon.errors import GradientError
from recon.methods.gradients import gramians
from recon.methods.gradients.gramians import gramian, layer_gramians
from recon.methods.gradients.jacobian import Workspace, task_jacobian, write_combination, write_own
from recon.problems import get
from recon.support.network.graph import reached_leaves
from recon.support.network.layers import find_layers


class TwoHeads(nn.Module):
    """Smooth, so that float32 and float64 differ by rounding alone; `extra` serves task a only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.extra = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)})

    def forward(self, x):
        features = torch.tanh(self.norm(self.conv(x))).mean(dim=(2, 3))
        return {"a": self.heads["a"](torch.tanh(self.extra(features))), "b": self.heads["b"](features)}


def losses_of(model, x):
    out = model(x)
    return {"a": out["a"].square().sum(), "b": (out["b"] - 1).square().mean()}


def autograd_cosines(model, losses):
    """{layer: cosine} by one full backward per task in float64, over Python lists: nothing of ours."""
    gradients = []
    for loss in losses.values():
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append({id(p): None if p.grad is None else p.grad.double().flatten() for p in model.parameters()})
    cosines = {}
    for layer in find_layers(model):
        first, second = ([g[id(p)] for p in layer.parameters.values()] for g in gradients)
        if not any(v is None for v in [*first, *second]):
            u, v = torch.cat(first), torch.cat(second)
            cosines[layer.name] = float(u @ v / (u.norm() * v.norm()))
    return cosines


def our_cosines(model, losses):
    layers = find_layers(model)
    layer_of = {p: i for i, layer in enumerate(layers) for p in layer.parameters.values()}
    numbers, gramians = layer_gramians(task_jacobian(losses, list(layer_of)), layer_of)
    return {layers[i].name: float(G[0, 1] / (G[0, 0] * G[1, 1]).sqrt()) for i, G in zip(numbers, gramians, strict=True)}


@pytest.mark.parametrize("room", [1, 40, 1 << 18])
def test_gramians_of_some_parameters_in_any_order(room, monkeypatch):
    """Some columns belong to no layer, and those of a layer lie apart; blocks of any size give the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(gramians, "_IN_CACHE", 2 * room)  # for two tasks
    parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (7, 30, 5, 60, 3, 11)]
    rows = {task: [torch.randn_like(p) for p in parameters] for task in ("a", "b")}
    losses = {task: sum((p * g).sum() for p, g in zip(parameters, row, strict=True)) for task, row in rows.items()}
    layers = {2: [5, 0, 3], 0: [2], 1: [4]}  # the second parameter is in none
    layer_of = {parameters[i]: number for number, places in layers.items() for i in places}
    numbers, found = layer_gramians(task_jacobian(losses, parameters), layer_of)
    assert numbers == [0, 1, 2]
    for number, product in zip(numbers, found, strict=True):
        J = torch.stack([torch.cat([row[i] for i in layers[number]]) for row in rows.values()])
        torch.testing.assert_close(product, J @ J.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_cosines_of_the_digits_model_equal_autograds(seed):
    problem = get("digits")
    torch.manual_seed(seed)
    model = problem.make_model().eval()
    x, targets = next(iter(problem.make_loaders(seed)[0]))

    def losses(model, x):
        return {task: F.cross_entropy(out, targets[task]) for task, out in model(x).items()}

    wide, wide_x = copy.deepcopy(model).double(), x.double()
    ours, oracle = our_cosines(wide, losses(wide, wide_x)), autograd_cosines(wide, losses(wide, wide_x))
    assert ours.keys() == oracle.keys() and len(ours) == 18
    assert ours == pytest.approx(oracle, abs=1e-12)
    # In float32: against float64 cosines of the same float32 gradients (a ReLU may flip between the precisions).
    assert our_cosines(model, losses(model, x)) == pytest.approx(autograd_cosines(model, losses(model, x)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_float32_cosines_of_a_smooth_model_equal_float64(seed):
    torch.manual_seed(seed)
    model, x = TwoHeads().eval(), torch.randn(32, 1, 6, 6)
    wide = copy.deepcopy(model).double()
    assert our_cosines(model, losses_of(model, x)) == pytest.approx(
        autograd_cosines(wide, losses_of(wide, x.double())), abs=1e-6
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10])
def test_cosines_do_not_depend_on_the_loss_scale(scale):
    torch.manual_seed(0)
    model, x = TwoHeads().eval(), torch.randn(8, 1, 6, 6)
    plain = our_cosines(model, losses_of(model, x))
    scaled = our_cosines(model, {"a": losses_of(model, x)["a"] * scale, "b": losses_of(model, x)["b"]})
    assert scaled == pytest.approx(plain, abs=1e-6)


def test_the_jacobian_tells_shared_from_own():
    model, x = TwoHeads(), torch.randn(4, 1, 6, 6)
    jacobian = task_jacobian(losses_of(model, x), model.parameters())
    assert [p.shape for p in jacobian.shared] == [p.shape for p in [*model.conv.parameters(), *model.norm.parameters()]]
    assert set(jacobian.own["a"]) == {*model.extra.parameters(), *model.heads["a"].parameters()}
    assert set(jacobian.own["b"]) == set(model.heads["b"].parameters())
    assert jacobian.matrix.shape == (2, sum(p.numel() for p in jacobian.shared))


def test_a_task_that_does_not_reach_a_shared_layer_has_a_zero_row_there():
    model, x = TwoHeads(), torch.randn(4, 1, 6, 6)
    losses = losses_of(model, x) | {"c": model.norm.weight.sum() + model.heads["b"].weight.sum()}
    workspace = Workspace()
    workspace.matrix([nn.Parameter(torch.empty(10_000))], 3)[0].fill_(torch.nan)  # what another step left
    jacobian = task_jacobian(losses, model.parameters(), workspace)
    conv = model.conv.weight.numel() + model.conv.bias.numel()
    assert not jacobian.matrix[2, :conv].any()
    assert jacobian.matrix[2].sum() == model.norm.weight.numel() + model.heads["b"].weight.numel()


def test_frozen_parameters_take_no_part():
    model, x = TwoHeads(), torch.randn(4, 1, 6, 6)
    model.conv.requires_grad_(False)
    assert [p.shape for p in task_jacobian(losses_of(model, x), model.parameters()).shared] == [(4,), (4,)]


def test_the_last_backward_frees_the_graph():
    model, x = TwoHeads(), torch.randn(4, 1, 6, 6)
    losses = losses_of(model, x)
    task_jacobian(losses, model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        losses["b"].backward()


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.ones(3, requires_grad=True).sum()])
def test_a_task_without_gradient_is_named(loss):
    model = TwoHeads()
    losses = losses_of(model, torch.randn(4, 1, 6, 6)) | {"lost": loss}
    with pytest.raises(GradientError, match=r"task 'lost' depends on no trainable parameter"):
        task_jacobian(losses, model.parameters())


def linear_losses(vectors, shape=(-1,)):
    """Losses whose gradients with respect to one parameter are the rows of `vectors`."""
    weight = nn.Parameter(torch.zeros(vectors.shape[1], dtype=vectors.dtype).view(shape))
    return weight, {f"task{i}": (weight.view(-1) * v).sum() for i, v in enumerate(vectors)}


def error_of_gramian(vectors):
    """Relative to the norms and to what n terms added up in float64 in any order may be off by, n times half an ulp."""
    weight, losses = linear_losses(vectors)
    found = gramian(task_jacobian(losses, [weight]))
    wide = vectors.double().numpy()
    expected = torch.tensor([[(a * b).sum() for b in wide] for a in wide])  # NumPy adds up in pairs, without BLAS
    norms = expected.diagonal().sqrt()
    bound = vectors.shape[1] * torch.finfo(torch.float64).eps / 2
    return float(((found - expected) / torch.outer(norms, norms)).abs().max() / bound)


@pytest.mark.parametrize("tasks, size", [(2, 5), (2, 32_768), (3, 10_001), (40, 10_000)])
def test_gramians_are_exact_in_float64(tasks, size):
    vectors = torch.randn(tasks, size)
    assert error_of_gramian(vectors) <= 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error_of_gramian(vectors) <= 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks, size", [(2, 1_000_003), (3, 400_001), (8, 200_001), (2, 5_000_000)])
def test_gramians_of_a_large_layer(tasks, size, threads):
    """On any number of threads, however small and large the gradients."""
    scales = [1.0] if size > 2_000_000 else [1.0, 1e-25, 1e25]
    vectors = torch.randn(tasks, size, generator=torch.Generator().manual_seed(tasks))
    for count, scale in zip((1, 2, 4), scales * 3, strict=False):
        threads(count)
        vectors[1] *= scale
        assert error_of_gramian(vectors) <= 1
        vectors[1] /= scale


def test_gradients_of_one_task_alone_count_in_the_norm_of_a_shared_layer():
    layer = nn.Linear(3, 2).double()
    layer_of = dict.fromkeys(layer.parameters(), 0)
    losses = {"a": layer.weight.square().sum() + layer.bias.square().sum(), "b": layer.weight.sum()}
    numbers, gramians = layer_gramians(task_jacobian(losses, layer.parameters()), layer_of)
    rows = torch.stack([2 * torch.cat([layer.weight.flatten(), layer.bias]), torch.tensor([1.0] * 6 + [0.0] * 2)])
    assert numbers == [0]
    torch.testing.assert_close(gramians[0], (rows @ rows.T).detach())


def test_tasks_that_use_different_parameters_of_a_layer_share_it():
    layer = nn.Linear(3, 2).double()
    losses = {"a": layer.weight.sum(), "b": layer.bias.sum()}
    numbers, gramians = layer_gramians(task_jacobian(losses, layer.parameters()), dict.fromkeys(layer.parameters(), 0))
    assert numbers == [0] and gramians.tolist() == [[[6.0, 0.0], [0.0, 2.0]]]


def test_a_shared_parameter_without_elements():
    empty, weight = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))
    for order in ([empty, weight], [weight, empty]):
        layer_of = {p: number for number, p in enumerate(order)}
        losses = {"a": weight.sum() + empty.sum(), "b": weight.sum() - empty.sum()}
        numbers, gramians = layer_gramians(task_jacobian(losses, order), layer_of)
        assert numbers == [layer_of[weight]] and gramians.tolist() == [[[2.0, 2.0], [2.0, 2.0]]]


def test_the_gradients_are_those_that_the_users_hooks_leave():
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(lambda gradient: gradient.clamp(max=1.0))
    jacobian = task_jacobian({"a": (weight * 5).sum(), "b": (weight * 0.5).sum()}, [weight])
    assert jacobian.matrix.tolist() == [[1.0] * 3, [0.5] * 3]


def test_half_precision_gradients_are_summed_in_float64():
    model = nn.Linear(3, 1).to(torch.bfloat16)
    out = model(torch.randn(4, 3, dtype=torch.bfloat16))
    jacobian = task_jacobian({"a": out.sum(), "b": out.square().sum()}, model.parameters())
    J = jacobian.matrix
    assert J.dtype == torch.float32 and gramian(jacobian).dtype == torch.float64
    torch.testing.assert_close(gramian(jacobian), J.double() @ J.double().T)


def test_sparse_gradients():
    embedding = nn.Embedding(6, 3, sparse=True)
    out = embedding(torch.tensor([1, 4, 4]))
    jacobian = task_jacobian({"a": out.sum(), "b": out.square().sum()}, embedding.parameters())
    assert jacobian.rows[embedding.weight].tolist() == [[1, 4]]
    assert jacobian.matrix[0].view(2, 3).sum(dim=1).tolist() == [3, 6]


@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, -1.0, 0.5])])
def test_combinations_never_write_into_what_autograd_returned(weights):
    class Constant(torch.autograd.Function):
        """Its gradient is a tensor of the user's own."""

        @staticmethod
        def forward(ctx, x, mine):
            ctx.mine = mine
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return ctx.mine, None

    weight, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    mine = torch.tensor([1.0, 2.0, 3.0])
    added = weight + other  # the two parameters are handed the same gradient tensor
    losses = {"a": Constant.apply(weight, mine), "b": Constant.apply(weight, mine), "c": (added * 4).sum()}
    jacobian = task_jacobian(losses, [weight, other])
    write_combination(jacobian, weights)
    write_own(jacobian)
    a, b, c = [1.0, 1.0, 1.0] if weights is None else weights.tolist()
    torch.testing.assert_close(weight.grad, (a + b) * torch.tensor([1.0, 2.0, 3.0]) + 4 * c)
    weight.grad.zero_()
    assert mine.tolist() == [1.0, 2.0, 3.0] and other.grad.tolist() == [4.0, 4.0, 4.0]


def test_reached_leaves_are_what_autograd_reaches():
    model, x = TwoHeads(), torch.randn(4, 1, 6, 6)
    out = model(x)
    for task, other in (("a", "b"), ("b", "a")):
        reached = reached_leaves([out[task]])
        grads = torch.autograd.grad(out[task].sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
        assert reached == {p for p, g in zip(model.parameters(), grads, strict=True) if g is not None}, other
