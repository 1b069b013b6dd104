"""Models of which autograd shows a part as one node: each task still reaches its own parameters, and no others.

The oracle is the same model without a wrapper.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

import recon
from recon.errors import UsageError
from recon.methods.gradients.reach import compiled_as_one, find_reach
from recon.support.network import opaque_nodes

TASKS = ("a", "b", "c")
Run = Callable[[Tensor], dict[str, Tensor]]


class Net(nn.Module):
    """A trunk that is used in another order than it is made; `extra` serves a and c, the head of b starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm, self.first = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(6, 8)
        self.extra, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})
        nn.init.zeros_(self.heads["b"].weight)  # its gradient in the trunk is zero, and yet it depends on it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.second(torch.relu(self.norm(self.first(x)))))
        e = torch.relu(self.extra(h)) + self.idle(h).detach()
        c = self.heads["c"](e)
        return {"a": self.heads["a"](e), "b": self.heads["b"](h.T.contiguous().T), "c": c.view(-1), "d": c.T, "h": h}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(number: int, samples: int = 12) -> Tensor:
    return torch.randn(samples, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def losses_of(run: Run, x: Tensor) -> dict[str, Tensor]:
    out = run(x)
    return {"a": (out["a"] - 1).square().mean(), "b": (3 - out["b"]).square().sum(), "c": (out["c"] + 2).abs().mean()}


def whole(model: nn.Module) -> Run:
    return torch.compile(model, backend="aot_eager")


def in_place(model: nn.Module) -> Run:
    model.compile(backend="aot_eager")
    return model


def parts(model: Net) -> Run:
    model.first = torch.compile(model.first, backend="aot_eager")
    model.extra.compile(backend="aot_eager")
    for task in TASKS:
        model.heads[task] = torch.compile(model.heads[task], backend="aot_eager")
    return model


def body_alone(model: Net) -> Run:
    def trunk(x: Tensor) -> Tensor:
        return torch.tanh(model.second(torch.relu(model.norm(model.first(x)))))

    compiled = torch.compile(trunk, backend="aot_eager")

    def run(x: Tensor) -> dict[str, Tensor]:
        h = compiled(x)
        e = torch.relu(model.extra(h)) + model.idle(h).detach()
        return {"a": model.heads["a"](e), "b": model.heads["b"](h), "c": model.heads["c"](e)}

    return run


def dynamic(model: nn.Module) -> Run:
    return torch.compile(model, backend="aot_eager", dynamic=True)


FORMS = [whole, in_place, parts, body_alone, dynamic]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


def step(model: nn.Module, losses: dict[str, Tensor], method: recon.methods.Method | None, **options: object) -> object:
    model.zero_grad()
    weights = recon.backward(losses, model, method, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    return weights


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    own = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    for name, expected in plain.named_parameters():
        assert (own[name].grad is None) == (expected.grad is None), name
        torch.testing.assert_close(own[name], expected, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_methods_on_a_compiled_model_train_it_as_the_plain_one(form: Callable[[nn.Module], Run]) -> None:
    methods = ["joint", "uw", "mgda", "nash-mtl", "uw+imtl-g", "gradnorm:layer=second"]
    plain, model = net(), net()
    run = form(model)
    for number, name in enumerate(methods):
        mine, theirs = recon.methods.parse(name), recon.methods.parse(name)
        for seed in (number, number + 10):
            x = batch(seed, 12 + number * (form is dynamic))
            expected = step(plain, losses_of(plain, x), theirs)
            weights = step(model, losses_of(run, x), mine)
            assert weights.keys() == expected.keys()
            for task, weight in weights.items():
                torch.testing.assert_close(weight, expected[task], rtol=1e-6, atol=1e-9, msg=f"{name}, {task}")
            assert_same(model, plain)


def test_every_loss_of_a_compiled_step_reaches_its_own_parameters() -> None:
    plain, model = net(), net()
    compiled = torch.compile(lambda x: losses_of(model, x), backend="aot_eager")
    mgda = [recon.methods.get("mgda") for _ in range(2)]
    step(plain, losses_of(plain, batch(0)), mgda[0])
    step(model, compiled(batch(0)), mgda[1])
    assert_same(model, plain)


def reach_of(losses: dict[str, Tensor], model: nn.Module) -> dict[str, list[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return {task: [names[p] for p in found] for task, found in find_reach(losses, names).parameters.items()}


class Signs(nn.Module):
    """Weights that a task reaches with a gradient of zero, or through one of two views, or by a changed input."""

    def __init__(self) -> None:
        super().__init__()
        self.sign, self.left, self.right = (nn.Parameter(torch.full((4, 4), value)) for value in (0.5, 1.0, 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        both = torch.stack([x @ self.left, x @ self.right])
        x = x @ self.sign.sign()
        return x * 2, both[0], both.view(-1), x @ self.left.detach()


def test_reach_through_views_and_gradients_of_zero() -> None:
    plain, model = Signs(), Signs()
    compiled = torch.compile(model, backend="aot_eager")

    def losses(run: Callable[[Tensor], tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {str(number): out.square().sum() for number, out in enumerate(run(torch.ones(3, 4)))}

    assert reach_of(losses(compiled), model) == reach_of(losses(plain), plain)


@pytest.mark.slow
def test_a_branched_model_that_is_compiled() -> None:
    plan = recon.BranchPlan.per_task(["extra"], (*TASKS, "d", "h"))
    plain, model = (recon.convert(net(), plan, batch(0)) for _ in range(2))
    run = torch.compile(model, backend="aot_eager")
    for seed in (1, 2):
        step(plain, losses_of(plain, batch(seed)), recon.methods.get("mgda"))
        step(model, losses_of(run, batch(seed)), recon.methods.get("mgda"))
        assert_same(model, plain)


def test_training_a_compiled_model() -> None:
    plain, model = net(), net()
    loader = [(batch(seed), dict.fromkeys(TASKS, torch.ones(()))) for seed in range(3)]
    losses = dict.fromkeys(TASKS, lambda out, target: (out - target).square().mean())
    for one in (plain, whole(model)):
        recon.train(one, loader, losses, optimizer=torch.optim.SGD(one.parameters(), 0.1), method="mgda", epochs=1)
    assert_same(model, plain)


def test_the_layer_that_a_compiled_model_uses_last_must_be_named() -> None:
    model = net()
    with pytest.raises(UsageError, match=r"cannot be seen from outside.*gradnorm:layer="):
        recon.backward(losses_of(whole(model), batch(0)), model, recon.methods.get("gradnorm"))


def test_a_method_that_works_at_the_features_needs_the_heads_apart() -> None:
    model = net()
    losses = losses_of(whole(model), batch(0))
    assert compiled_as_one(losses)
    with pytest.raises(UsageError, match=r"'rotograd' works between the shared layers and the heads.* compiled as one"):
        recon.backward(losses, model, recon.methods.get("rotograd"))
    assert not compiled_as_one(losses_of(body_alone(net()), batch(0)))
    assert not compiled_as_one(losses_of(net(), batch(0)))


def test_a_model_that_was_compiled_for_one_backward_pass() -> None:
    model = net()
    run = whole(model)
    with torch._functorch.config.patch(donated_buffer=True):
        step(model, losses_of(run, batch(0)), None)  # one pass
        reached = [p for p in model.parameters() if p.grad is not None]
        kept = [p.grad.clone() for p in reached]
        for name in ("mgda", "gradnorm:layer=second"):
            with pytest.raises(UsageError, match="donated_buffer = False before the model runs"):
                recon.backward(losses_of(run, batch(1)), model, recon.methods.parse(name))
        with pytest.raises(UsageError, match="donated_buffer = False before the model runs"):
            recon.Profiler(run).backward(losses_of(run, batch(1)))
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(reached, kept, strict=True))
    torch.compiler.reset()  # what the message says
    step(model, losses_of(run, batch(0)), None)
    step(model, losses_of(run, batch(1)), recon.methods.get("mgda"))


def test_a_compiled_part_that_torch_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a version of torch that keeps the graph elsewhere: refused where the tasks part inside, else as before."""

    def trace(forward: object) -> None:
        raise AttributeError("_lazy_backward_info")

    monkeypatch.setattr(opaque_nodes, "_trace", trace)
    model, plain = net(), net()
    run = whole(model)
    for method in (None, recon.methods.get("uw")):
        step(model, losses_of(run, batch(0)), method)
    with pytest.raises(UsageError, match="was compiled as a whole, which hides"):
        recon.backward(losses_of(run, batch(0)), model, recon.methods.get("mgda"))
    with pytest.raises(UsageError, match="was compiled as a whole, which hides"):
        recon.Profiler(run).backward(losses_of(run, batch(0)))
    model, run = net(), None
    run = body_alone(model)
    step(model, losses_of(run, batch(0)), recon.methods.get("mgda"))
    step(plain, losses_of(body_alone(plain), batch(0)), recon.methods.get("mgda"))
    assert_same(model, plain)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x)).sigmoid() * 2
        return self.a(h).tanh() * 3 + 1, self.b(h).sigmoid() * 2 + 1


PAIR = {
    "0": ["body.weight", "body.bias", "a.weight", "a.bias"],
    "1": ["body.weight", "body.bias", "b.weight", "b.bias"],
}


def pair_losses(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {str(number): out.sum() for number, out in enumerate(outputs)}


def test_a_backward_hook_on_the_model_does_not_join_the_heads() -> None:
    model = Pair().double()
    model.register_full_backward_hook(lambda *_: None)
    assert reach_of(pair_losses(model(batch(0))), model) == PAIR


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_once_it_hides_its_heads() -> None:
    model = torch.jit.script(Pair().double())
    for _ in range(3):  # the first runs only watch
        losses = pair_losses(model(batch(0)))
        recon.backward(losses, model)
    with pytest.raises(UsageError, match=r"scripted or traced \(torch\.jit\), which hides"):
        recon.backward(pair_losses(model(batch(0))), model, recon.methods.get("mgda"))


class Broadcast(torch.autograd.Function):
    """As DataParallel's: every parameter for two devices."""

    @staticmethod
    def forward(ctx: object, devices: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for _ in devices for tensor in tensors)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        half = len(gradients) // 2
        return None, *(g + h for g, h in zip(gradients[:half], gradients[half:], strict=True))


class Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def test_copies_for_several_devices_reach_their_own_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    a, frozen, b = nn.Parameter(torch.ones(2)), torch.ones(2), nn.Parameter(torch.ones(2))
    module = nn.ParameterList([a, b])
    one, two = 0 * a.sum(), 0 * b.sum()
    everything = {"a": ["0", "1"], "b": ["0", "1"]}
    losses = dict(zip("ab", map(Tensor.sum, Broadcast.apply([0, 1], a, frozen, b)[3::2]), strict=True))
    assert reach_of(losses, module) == everything  # a user's function of that name may do anything
    monkeypatch.setattr(Broadcast, "__module__", "torch.nn.parallel._functions")
    losses = {"a": losses["a"] + one, "b": losses["b"] + two}
    assert reach_of(losses, module) == {"a": ["0"], "b": ["1"]}


def test_captured_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    monkeypatch.setattr(Graphed, "__module__", "torch.cuda.graphs")
    losses = dict(zip("ab", map(Tensor.sum, Graphed.apply(*module)), strict=True))
    with pytest.raises(UsageError, match="captured in CUDA graphs"):
        find_reach(losses, module.parameters())
