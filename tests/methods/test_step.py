import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import recon
from recon.errors import GradientError, UsageError
from recon.methods import Aggregator
from recon.methods.updates.step import backward
from recon.profiling.profiler import Profiler
from tests.methods.test_jacobian import TwoHeads, losses_of

FAMILY = {name: recon.methods.entry(name).family for name in recon.methods.names()}
WEIGHTINGS = [name for name, family in FAMILY.items() if family == "weighting"]
AGGREGATORS = [name for name, family in FAMILY.items() if family == "aggregator" and name != "graddrop"]  # it draws
SINGLE = 8 * torch.finfo(torch.float32).eps  # what a weight is off by that a few operations in float32 made


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads().double().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(16, 1, 6, 6, dtype=torch.float64)


def gradients_by_task(model, x):
    """Plain autograd: {task: [gradient of each parameter]}, zeros where the task does not reach it."""
    parameters = list(model.parameters())
    return {
        task: torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        for task, loss in losses_of(model, x).items()
    }


def shared_rows(model, gradients):
    """(T, P) of what both tasks reach: the stem."""
    stem = [i for i, (name, _) in enumerate(model.named_parameters()) if name.startswith(("conv", "norm"))]
    return torch.stack([torch.cat([g[i].flatten() for i in stem]) for g in gradients.values()])


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("method", ["joint", "uw", "dwa", "gradnorm", *AGGREGATORS])
def test_grad_is_the_methods_update(model, x, method, profiled):
    gradients = gradients_by_task(model, x)
    rows = shared_rows(model, gradients)
    expected = recon.methods.get(method)(rows)
    profiler = Profiler(model) if profiled else None
    weights = backward(losses_of(model, x), model, recon.methods.get(method), profiler=profiler)
    stem = torch.cat([p.grad.flatten() for p in [*model.conv.parameters(), *model.norm.parameters()]])
    torch.testing.assert_close(stem, expected, rtol=1e-9, atol=1e-9)
    # What one task alone reaches is in no conflict: aggregators leave it, and these weightings start at one.
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.startswith(("extra", "heads")):
            torch.testing.assert_close(p.grad, sum(g[i] for g in gradients.values()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack([weights["a"], weights["b"]]).double() @ rows, expected)
    if profiler is not None:
        assert profiler.conflict_map().steps == 1


@pytest.mark.parametrize("profiled", [False, True])
def test_a_learned_weighting_scales_everything_and_learns(model, x, profiled):
    gradients = gradients_by_task(model, x)
    method = recon.methods.get("uw")
    method.setup(("a", "b"))
    log_variances = list(method.parameters())
    with torch.no_grad():
        for s, value in zip(log_variances, (0.5, -1.0), strict=True):
            s.fill_(value)
    losses = losses_of(model, x)
    backward(losses, model, method, profiler=Profiler(model) if profiled else None)
    scale = {"a": torch.tensor(-0.5).exp(), "b": torch.tensor(1.0).exp()}
    largest = max(float(scale[t] * v.abs().max()) for t, g in gradients.items() for v in g)
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(
            p.grad, sum(scale[t] * g[i] for t, g in gradients.items()), rtol=0, atol=SINGLE * largest
        )
    for s, task in zip(log_variances, ("a", "b"), strict=True):
        torch.testing.assert_close(
            s.grad.double(), 1 - (loss := scale[task] * losses[task].detach()), rtol=0, atol=SINGLE * (1 + loss)
        )


def test_grad_accumulates(model, x):
    method = recon.methods.get("pcgrad")
    backward(losses_of(model, x), model, method)
    once = [p.grad.clone() for p in model.parameters()]
    backward(losses_of(model, x), model, method)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_a_method_that_needs_the_jacobian_itself(model, x):
    class Longest(Aggregator):
        name = "longest"

        def forward(self, J):
            return J[J.norm(dim=1).argmax()]

    rows = shared_rows(model, gradients_by_task(model, x))
    assert backward(losses_of(model, x), model, Longest()) == {}
    stem = torch.cat([p.grad.flatten() for p in [*model.conv.parameters(), *model.norm.parameters()]])
    torch.testing.assert_close(stem, rows[rows.norm(dim=1).argmax()])


@pytest.mark.parametrize("method", WEIGHTINGS + AGGREGATORS)
def test_a_step_with_one_task_alone(model, x, method):
    chosen = recon.methods.get(method)
    chosen.setup(("a", "b"))
    expected = gradients_by_task(model, x)["a"]
    backward({"a": losses_of(model, x)["a"]}, model, chosen)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, g, rtol=SINGLE, atol=1e-12)


def test_a_branched_models_copies_get_their_own_groups_gradient(model, x):
    """Gradients of the branched model under PCGrad, against the two plain models and Algorithm 1 at T = 2."""
    plan = recon.BranchPlan.per_task(["conv"], ("a", "b"))
    branched = recon.convert(model, plan, x[:4]).eval()
    with torch.no_grad():
        branched.conv.branches.b.weight.add_(0.3)
    plain = {task: recon.extract_task(branched, task).eval() for task in ("a", "b")}
    backward(losses_of(branched, x), branched, recon.methods.get("pcgrad"))
    own, rows = {}, []
    for task, net in plain.items():
        named = dict(net.named_parameters())
        loss = losses_of(net, x)[task]
        own[task] = torch.autograd.grad(loss, named["conv.weight"], retain_graph=True)[0]
        rows.append(torch.cat(torch.autograd.grad(loss, [named["norm.weight"], named["norm.bias"]])))
    for task in ("a", "b"):
        torch.testing.assert_close(branched.conv.branches.get_submodule(task).weight.grad, own[task])
    a, b = rows
    dot = a @ b
    expected = a + b if dot >= 0 else a + b - dot / (b @ b) * b - dot / (a @ a) * a
    torch.testing.assert_close(torch.cat([branched.norm.weight.grad, branched.norm.bias.grad]), expected)


def test_joint_equals_the_sum_of_losses(model, x):
    plain = copy.deepcopy(model)
    backward(losses_of(model, x), model)
    sum(losses_of(plain, x).values()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_gradient_that_is_not_finite_is_refused_by_name(model, x):
    losses = losses_of(model, x)
    with pytest.raises(GradientError, match="'b'"):
        backward({"a": losses["a"], "b": losses["b"] * float("nan")}, model, recon.methods.get("mgda"))
    assert all(p.grad is None for p in model.parameters())


def test_no_losses(model):
    for method in ("joint", "pcgrad"):
        with pytest.raises(UsageError):
            backward({}, model, recon.methods.get(method))


@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad"])
def test_losses_that_cannot_be_differentiated_are_refused(model, x, method):
    losses = losses_of(model, x)
    with pytest.raises(GradientError, match="task 'b' depends on no trainable parameter"):
        backward({**losses, "b": losses["b"].detach()}, model, recon.methods.get(method))
    with pytest.raises(UsageError, match=r"task 'b' must be a scalar tensor, but is a tensor of shape \(2,\)"):
        backward({**losses, "b": losses["b"].expand(2)}, model, recon.methods.get(method))


@pytest.mark.parametrize("method", ["uw", "gradnorm", "sdmgrad", "uw+pcgrad"])
def test_a_task_that_the_first_batch_lacked(model, x, method):
    chosen = recon.methods.get(method)
    backward({"a": losses_of(model, x)["a"]}, model, chosen)
    with pytest.raises(UsageError, match=r"no task named 'b'.* name all tasks before the first step: method.setup"):
        backward(losses_of(model, x), model, chosen)


@pytest.mark.parametrize("method", ["joint", "uw", "mgda", "gradnorm", "uw+mgda"])
@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_model_in_parts(model, x, method, sequence):
    whole = copy.deepcopy(model)
    parts = sequence([nn.Sequential(model.conv, model.norm), model.extra, *model.heads.values()])
    methods = [recon.methods.parse(method) for _ in range(2)]
    for one, update in zip((parts, whole), methods, strict=True):
        backward(losses_of(model if one is parts else whole, x), one, update)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    profiler = Profiler(parts)
    profiler.backward(losses_of(model, x))
    assert [layer.name for layer in profiler.conflict_map().layers] == ["0.0", "0.1"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: list(model.parameters()), "a list of parameters"),
        (lambda model: model.parameters(), "a generator, of parameters perhaps"),
        (lambda model: (model.conv.weight, model.norm), "a tuple of parameters and"),
        (lambda model: torch.optim.SGD(model.parameters(), 0.1), r"an optimizer \(SGD\)"),
        (lambda model: StepLR(torch.optim.SGD(model.parameters(), 0.1), 1), "a learning rate scheduler"),
        (lambda model: {"encoder": model}, "a dict; torch.nn.ModuleDict makes one module"),
        (type, "the class TwoHeads, not one of its objects"),
        (lambda model: [], "an empty list"),
        (lambda model: None, "None"),
    ],
    ids=["parameters", "generator", "mixed", "optimizer", "scheduler", "dict", "class", "empty", "none"],
)
def test_what_is_no_model(model, x, make, words):
    for use in (lambda it: backward(losses_of(model, x), it), Profiler):
        with pytest.raises(UsageError, match=f"model is {words}.* Pass the torch.nn.Module that trains"):
            use(make(model))


class Engine(nn.Module):
    """What DeepSpeed's looks like."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def backward(self, loss): ...

    def step(self): ...

    def save_checkpoint(self, folder): ...


def emptied(model):
    model.conv.weight.data = torch.empty(0, dtype=torch.float64)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Engine, "The model is a Engine, an engine with backward"),
        (lambda model: nn.ModuleList([Engine(model)]), "Module '0' is a Engine"),
        (emptied, "Parameter 'conv.weight' is empty: its values are partitioned"),
        (lambda model: model.to("meta"), "Parameter 'conv.weight' is on the meta device"),
    ],
    ids=["engine", "inner engine", "placeholder", "meta"],
)
def test_a_model_whose_parameters_are_elsewhere(model, x, make, words):
    losses, parameters = losses_of(model, x), list(model.parameters())
    model = make(model)
    optimizer = torch.optim.SGD(parameters, 0.1)
    for use in (
        lambda: backward(losses, model),
        lambda: backward(losses, model, recon.methods.get("mgda")),
        lambda: Profiler(model),
        lambda: recon.train(model, [], {}, optimizer=optimizer),
        lambda: recon.profile(model, [], {}, optimizer=optimizer),
    ):
        with pytest.raises(UsageError, match=words):
            use()
    if "meta" not in words:
        with pytest.raises(UsageError, match=words):
            recon.convert(model, recon.BranchPlan.per_task(["conv"], ("a", "b")), x)


def test_an_empty_parameter_of_one_s_own_is_none_of_the_engine_s_business(model, x):
    model.device_of = nn.Parameter(torch.empty(0))
    backward(losses_of(model, x), model, recon.methods.get("mgda"))
    assert model.device_of.grad is None


def test_an_optimizer_that_needs_a_closure_in_a_loop_of_one_s_own(model, x):
    """As the refusal of `train` says; LBFGS with the sum of the losses is the oracle."""
    plain = copy.deepcopy(model)

    def closure_of(net, optimizer, differentiate):
        def closure():
            optimizer.zero_grad()
            losses = losses_of(net, x)
            differentiate(losses)
            return sum(losses.values())

        return closure

    steps = {model: lambda losses: backward(losses, model), plain: lambda losses: sum(losses.values()).backward()}
    for net, differentiate in steps.items():
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
        optimizer.step(closure_of(net, optimizer, differentiate))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
