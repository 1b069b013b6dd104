import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recon
from recon.errors import UsageError
from recon.profiling.profiler import Profiler
from recon.profiling.sketches.sketch import SIZE, GradientSketch, sketch_gramians
from tests.methods.test_jacobian import TwoHeads, losses_of


def cosine(G):
    return float(G[0, 1] / (G[0, 0] * G[1, 1]).sqrt())


def sketched(layer, rows, size=SIZE):
    """The Gramian of a layer from its parameters' gradients, task by task."""
    sketch = GradientSketch([layer], size)
    sketches = sketch.zeros(len(rows), torch.device("cpu"))
    for row, task in zip(rows, sketches, strict=True):
        for parameter, gradient in zip(layer, row, strict=True):
            sketch.fold(parameter, gradient, task)
    return sketch_gramians(sketches)[0]


def draw(kind, shape, generator):
    """Gradients as they come: spread out, in few rows, in few columns, sparse, of rank one."""
    g = torch.randn(shape, generator=generator)
    flat = g.view(len(g), -1)
    if kind == "rows":
        flat *= torch.randn(len(flat), 1, generator=generator).exp().square()
    elif kind == "columns":
        flat *= torch.randn(1, flat.shape[1], generator=generator).exp().square()
    elif kind == "sparse":
        flat *= torch.rand(flat.shape, generator=generator) < 0.01
    elif kind == "rank one":
        flat.copy_(flat[:, :1] * flat[:1])
    return g


@pytest.mark.parametrize("kind", ["spread", "rows", "columns", "sparse", "rank one"])
@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (256, 128, 3, 3), (100, 512), (64, 64, 3, 3)])
def test_cosines_err_by_less_than_three_hundredths(kind, shape):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))]
    errors = []
    for trial in range(12):
        own = [[draw(kind, p.shape, generator) for p in parameters] for _ in range(2)]
        common = [draw(kind, p.shape, generator) for p in parameters]
        mix = (trial - 6) / 6
        rows = [own[0], [mix * a + b for a, b in zip(own[0], own[1], strict=True)]]
        rows = [[g + 0.3 * c for g, c in zip(row, common, strict=True)] for row in rows]
        flat = [torch.cat([g.flatten() for g in row]).double() for row in rows]
        errors.append(cosine(sketched(parameters, rows)) - float(F.cosine_similarity(*flat, dim=0)))
    assert torch.tensor(errors).square().mean().sqrt() < 0.03


def test_gradients_of_one_sign_in_many_small_parameters_do_not_add_up():
    """Each parameter is a part of a row of signs: without them, orthogonal gradients would fold onto each other."""
    parameters = [nn.Parameter(torch.empty(1500)) for _ in range(6)]
    ones, zeros = torch.ones(1500), torch.zeros(1500)
    rows = [[ones] * 3 + [zeros] * 3, [zeros] * 3 + [ones] * 3]
    assert abs(cosine(sketched(parameters, rows))) < 0.1  # of a standard deviation of 0.022


@pytest.mark.parametrize("shapes", [[(3,)], [(40, 50), (39,)], [(2039,)]])
def test_a_small_layer_is_exact(shapes):
    parameters = [nn.Parameter(torch.empty(shape)) for shape in shapes]
    rows = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    torch.testing.assert_close(sketched(parameters, rows), J @ J.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [7, 100, 2039])
def test_sketches_add_up(size):
    parameters = [nn.Parameter(torch.empty(300, 11)), nn.Parameter(torch.empty(5)), nn.Parameter(torch.empty(1234))]
    sketch = GradientSketch([parameters], size)
    one, two, both = sketch.zeros(3, torch.device("cpu"))
    for p in parameters:
        g, h = torch.randn(2, *p.shape)
        sketch.fold(p, g, one)
        sketch.fold(p, h, two)
        sketch.fold(p, g + h, both)
    torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-4)
    assert torch.count_nonzero(both) == size


def test_a_long_layer_uses_the_signs_again_without_harm():
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.empty(3, 512 * 40))  # several times the signs of a sketch of 40
    errors = []
    for _ in range(200):
        g, h = (torch.randn(p.shape, generator=generator) for _ in range(2))
        errors.append(cosine(sketched([p], [[g], [h]], size=40)))
    # Unrelated gradients: the standard deviation of 1 / sqrt(40), and no bias.
    assert torch.tensor(errors).std() == pytest.approx(40**-0.5, rel=0.15)
    assert abs(torch.tensor(errors).mean()) < 3 * 40**-0.5 / 200**0.5


@pytest.mark.parametrize("method", ["joint", "uw", "dwa"])
def test_a_sketched_step_trains_like_an_exact_one(method):
    torch.manual_seed(0)
    models = [TwoHeads().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 1, 6, 6, dtype=torch.float64)
    for model, memory in zip(models, ("exact", "sketch"), strict=True):
        profiler, chosen = Profiler(model, memory=memory), recon.methods.get(method)
        for _ in range(3):
            recon.backward(losses_of(model, x), model, chosen, profiler=profiler)
    for exact, sketched_one in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(exact.grad, sketched_one.grad, rtol=1e-12, atol=1e-12)


def test_a_sketched_map_of_a_small_model_is_the_exact_one():
    maps = []
    for memory in ("exact", "sketch"):
        torch.manual_seed(0)
        model = TwoHeads()  # every layer is smaller than a sketch
        profiler = Profiler(model, memory=memory)
        for _ in range(20):
            model.zero_grad()
            profiler.backward(losses_of(model, torch.randn(8, 1, 6, 6)))
        maps.append(profiler.conflict_map())
    for exact, sketch in zip(maps[0].layers, maps[1].layers, strict=True):
        assert exact.name == sketch.name and exact.histogram.tolist() == sketch.histogram.tolist()


def test_gradients_of_the_digits_model():
    problem = recon.problems.get("digits")
    torch.manual_seed(0)
    model = problem.make_model()
    errors = []
    for x, targets in [batch for batch, _ in zip(problem.make_loaders(0)[0], range(3), strict=False)]:
        gradients = []
        for task, out in copy.deepcopy(model)(x).items():
            del out
            twin = copy.deepcopy(model)
            F.cross_entropy(twin(x)[task], targets[task]).backward()
            gradients.append({name: p.grad for name, p in twin.named_parameters()})
        for layer in recon.support.network.layers.find_layers(model):
            rows = [[g[f"{layer.name}.{name}"] for name in layer.parameters] for g in gradients]
            if not any(g is None for row in rows for g in row):
                flat = [torch.cat([g.flatten() for g in row]).double() for row in rows]
                exact = float(F.cosine_similarity(*flat, dim=0))
                errors.append(cosine(sketched(list(layer.parameters.values()), rows)) - exact)
    assert len(errors) == 54 and torch.tensor(errors).square().mean().sqrt() < 0.03


def test_a_method_that_needs_the_gradients_is_refused():
    model = TwoHeads()
    with pytest.raises(UsageError, match="'pcgrad' works from them"):
        recon.backward(
            losses_of(model, torch.randn(4, 1, 6, 6)),
            model,
            recon.methods.get("pcgrad"),
            profiler=Profiler(model, memory="sketch"),
        )
    with pytest.raises(UsageError, match="'exact' or 'sketch'"):
        Profiler(model, memory="small")
