import copy
import math

import pytest
import torch
from torch import nn

import recon
from recon.errors import GradientError
from recon.methods import Aggregator
from recon.training.loss_scale import LossScale

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two tasks, with gradients of 1e-7 that float16 rounds to few digits or to nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    def forward(self, x):
        x = self.body(x).tanh()
        return {task: head(x) for task, head in self.heads.items()}


class Remembers(Aggregator):
    """A method with a state that a gradient which is not finite would spoil."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, J):
        self.seen += J.sum()
        return J.sum(0)


def losses_of(model, x):
    return {task: out.pow(2).mean() for task, out in model(x).items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad", "cagrad", "mgda"])
def test_the_scale_leaves_losses_weights_and_updates_as_they_are(model, method):
    other = copy.deepcopy(model)
    plain, scaled = recon.methods.get(method), recon.methods.get(method)
    for each in (plain, scaled):
        each.setup(("a", "b"))
    expected = recon.backward(losses_of(model, X), model, plain)
    scale = LossScale(CPU)
    found = scale.backward(losses_of(other, X), other, scaled)
    assert scale.finish_step(scaled) and scale.value == 2**16
    assert {task: w.item() for task, w in found.items()} == pytest.approx({t: w.item() for t, w in expected.items()})
    for one, two in zip(
        [*model.parameters(), *plain.parameters()], [*other.parameters(), *scaled.parameters()], strict=True
    ):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=0)


def test_gradients_too_small_for_float16_come_through(model):
    """The way back through a float16 activation, as autocast would make it."""

    def half(x):
        return x.half().to(x.dtype)

    def gradient(scale):
        net = copy.deepcopy(model)
        hidden = half(net.body(X))
        loss = {"a": (1e-8 * net.heads["a"](hidden)).mean()}
        scale.backward(loss, net, recon.methods.get("joint")) if scale else sum(loss.values()).backward()
        return net.body.weight.grad

    assert (gradient(None) == 0).all()
    exact = copy.deepcopy(model)
    (1e-8 * exact.heads["a"](exact.body(X))).mean().backward()
    torch.testing.assert_close(gradient(LossScale(CPU)), exact.body.weight.grad, rtol=0.02, atol=1e-12)


@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad", "mgda"])
def test_an_overflow_is_no_error_and_halves_the_scale(model, method):
    scale, method = LossScale(CPU), recon.methods.get(method)
    method.setup(("a", "b"))
    losses = losses_of(model, X)
    scale.backward(losses | {"a": losses["a"] * torch.tensor(1e308)}, model, method)
    assert not scale.finish_step(method) and scale.value == 2**15
    model.zero_grad()
    scale.backward(losses_of(model, X), model, method)
    assert scale.finish_step(method)


def joint_step(scale, window, losses):
    """The losses of one forward after the other."""
    with scale.joint_step(window):
        for task, loss in scale.multiplied(losses).items():
            window.add(task, loss, retain_graph=task == "a")
        return window.step()
    return {}


@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad", "cagrad", "mgda"])
def test_the_scale_leaves_a_joint_step_as_it_is(model, method):
    other = copy.deepcopy(model)
    plain, scaled = recon.methods.get(method), recon.methods.get(method)
    for each in (plain, scaled):
        each.setup(("a", "b"))
    expected = recon.backward(losses_of(model, X), model, plain)
    scale = LossScale(CPU)
    found = joint_step(scale, recon.Window(other, scaled), losses_of(other, X))
    assert scale.finish_step(scaled) and scale.value == 2**16
    assert {task: w.item() for task, w in found.items()} == pytest.approx({t: w.item() for t, w in expected.items()})
    for one, two in zip(
        [*model.parameters(), *plain.parameters()], [*other.parameters(), *scaled.parameters()], strict=True
    ):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["joint", "pcgrad", "mgda"])
def test_an_overflow_in_a_joint_step_leaves_nothing_in_the_window(model, method):
    scale, method = LossScale(CPU), recon.methods.get(method)
    method.setup(("a", "b"))
    window, losses = recon.Window(model, method), losses_of(model, X)
    joint_step(scale, window, losses | {"a": losses["a"] * torch.tensor(1e308)})
    assert not scale.finish_step(method) and scale.value == 2**15 and window.added == ()
    model.zero_grad()
    joint_step(scale, window, losses_of(model, X))
    assert scale.finish_step(method)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_method_forgets_what_overflowed(model):
    scale, method = LossScale(CPU), Remembers()
    method.setup(("a", "b"))
    scale.backward(losses_of(model, X), model, method)
    scale.finish_step(method)
    before = method.seen.clone()
    assert before != 0
    scale.backward(losses_of(model, X), model, method)  # the first batch of a step
    losses = losses_of(model, X)
    scale.backward(losses | {"a": losses["a"] * torch.tensor(1e308)}, model, method)
    assert not method.seen.isfinite()
    assert not scale.finish_step(method) and torch.equal(method.seen, before)


def test_errors_that_are_no_overflow_stay_errors(model):
    with pytest.raises(GradientError, match="depends on no trainable parameter"):
        LossScale(CPU).backward({"a": torch.ones((), requires_grad=True) * 2}, model, recon.methods.get("pcgrad"))


def test_the_scale_grows_after_many_good_steps_and_goes_on_after_a_resume():
    scale, method = LossScale(CPU), recon.methods.get("joint")
    for _ in range(1500):
        scale.finish_step(method)
    again = LossScale(CPU)
    again.load_state_dict(scale.state_dict())
    for _ in range(500):
        assert again.value == 2**16
        again.finish_step(method)
    assert again.value == 2**17


def test_gradients_that_are_never_finite_are_an_error(model):
    scale, method = LossScale(CPU), recon.methods.get("joint")
    method.setup(("a",))
    with pytest.raises(GradientError, match="overflow in float16 at every scale"):
        for _ in range(20):
            scale.backward({"a": losses_of(model, X)["a"] * math.inf}, model, method)
            scale.finish_step(method)
