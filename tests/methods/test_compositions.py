"""A weighting before an aggregator: against the aggregator of the weighted gradients."""

from __future__ import annotations

import pytest
import torch

import recon
from recon import methods
from recon.errors import UnknownNameError, UsageError
from recon.methods import Aggregator, Composition
from recon.profiling.profiler import Profiler
from tests.methods.test_methods import saved
from tests.methods.test_step import SINGLE, gradients_by_task, losses_of, model, shared_rows, x

fixtures = (model, x)
TASKS = ("a", "b")


class Longest(Aggregator):
    """One that needs the gradients themselves."""

    name = "longest"

    def forward(self, J):
        return J[J.norm(dim=1).argmax()]


def made(name):
    """The method, its weighting away from weights of 1."""
    method = Composition(methods.get("dwa"), Longest()) if name == "dwa+longest" else methods.parse(name)
    method.setup(TASKS)
    for s, parameter in zip((0.5, -1.0), method.parameters(), strict=False):
        torch.nn.init.constant_(parameter, s)
    if isinstance(method.weighting, methods.DWA):
        for b in (1.0, 3.0):
            method.weighting.combine({"a": torch.tensor(1.0), "b": torch.tensor(b)})
            method.end_epoch()
    return method


NAMES = ["uw+pcgrad", "joint:weights=0.2/1.8+cagrad:c=0.3", "dwa:temperature=1+mgda", "dwa+longest", "gls+cagrad"]


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_aggregator_gets_the_weighted_gradients(model, x, name, profiled):
    gradients = gradients_by_task(model, x)
    losses = losses_of(model, x)
    _, scales = made(name).weighting.combine({task: loss.detach() for task, loss in losses.items()})
    scale = torch.stack([scales[task].detach() for task in TASKS])
    assert not torch.allclose(scale, torch.ones_like(scale))
    rows = shared_rows(model, gradients)
    expected = made(name).aggregator(scale[:, None] * rows)
    method = made(name)
    profiler = Profiler(model) if profiled else None
    weights = recon.backward(losses, model, method, profiler=profiler)
    stem = torch.cat([p.grad.flatten() for p in [*model.conv.parameters(), *model.norm.parameters()]])
    torch.testing.assert_close(stem, expected, rtol=1e-7, atol=1e-9)
    if weights:
        torch.testing.assert_close(torch.stack([weights[t] for t in TASKS]) @ rows, stem, rtol=1e-7, atol=1e-9)
    # What one task alone reaches gets that task's weight.
    for i, (parameter, p) in enumerate(model.named_parameters()):
        if parameter.startswith(("extra", "heads")):
            task = "b" if parameter.startswith("heads.b") else "a"
            torch.testing.assert_close(p.grad, scales[task].double() * gradients[task][i], rtol=1e-7, atol=1e-9)
    if profiler is not None:  # conflicts are those of the gradients without weights
        plain = Profiler(model)
        plain.backward(losses_of(model, x))
        ours, theirs = profiler.conflict_map(), plain.conflict_map()
        assert [k.histogram.tolist() for k in ours.layers] == [k.histogram.tolist() for k in theirs.layers]


def test_a_learned_weighting_gets_its_gradients(model, x):
    method = made("uw+pcgrad")
    losses = losses_of(model, x)
    recon.backward(losses, model, method)
    for s, task in zip(method.parameters(), TASKS, strict=True):
        weighted = (-s).detach().exp() * losses[task].detach()
        torch.testing.assert_close(s.grad.double(), 1 - weighted, rtol=0, atol=SINGLE * (1 + weighted))


def test_gradnorm_learns_in_a_composition(model, x):
    """The same weights as alone: its norms are those of the losses, not of what the aggregator makes of them."""
    alone, composed = methods.get("gradnorm"), methods.get("gradnorm+cagrad")
    for method in (alone, composed):
        recon.backward(losses_of(model, x), model, method)
    assert composed.weighting.weights(2).equal(alone.weights(2))
    assert not alone.weights(2).equal(torch.ones(2))


def test_forward_uses_the_present_weights():
    J = torch.randn(2, 7, dtype=torch.float64)
    method = made("uw+cagrad")
    scale = torch.tensor([-0.5, 1.0]).exp().double()
    torch.testing.assert_close(method(J), methods.get("cagrad")(scale[:, None] * J), rtol=1e-6, atol=1e-9)
    with pytest.raises(UsageError, match="but got 3 rows"):
        method(torch.ones(3, 2))


def test_everything_reaches_both_parts(model, x):
    method = methods.get("famo+pcgrad")
    assert (method.name, method.needs_new_losses) == ("famo+pcgrad", True)
    assert not methods.get("uw+pcgrad").needs_new_losses
    called = []
    method.setup(TASKS)
    assert method.weighting.tasks == method.aggregator.tasks == TASKS
    for part in method.parts:
        part.attach = lambda model, part=part: called.append((part.name, "attach"))
        part.end_epoch = lambda part=part: called.append((part.name, "end_epoch"))
    method.attach(model)
    method.end_epoch()
    assert called == [(name, what) for what in ("attach", "end_epoch") for name in ("famo", "pcgrad")]
    recon.backward(losses_of(model, x), model, method)
    method.after_step({"a": torch.tensor(0.1), "b": torch.tensor(9.0)})
    assert not method.weighting.logits.value.equal(torch.zeros(2))


def test_state_continues_to_the_bit(model, x):
    def step(method):
        model.zero_grad()
        losses = losses_of(model, x)
        weights = recon.backward(losses, model, method)
        method.after_step({task: loss.detach() * (0.3 if task == "a" else 1) for task, loss in losses.items()})
        return [weight.item() for weight in weights.values()]

    method, resumed = methods.get("famo+pcgrad"), methods.get("famo+pcgrad")
    for _ in range(3):
        step(method)
    resumed.setup(TASKS)
    resumed.load_state_dict(saved(method))
    assert [step(resumed) for _ in range(4)] == [step(method) for _ in range(4)]


def test_a_missing_task_is_left_out(model, x):
    method = made("uw+pcgrad")
    expected = gradients_by_task(model, x)["b"]
    recon.backward({"b": losses_of(model, x)["b"]}, model, method)
    for p, g in zip(model.parameters(), expected, strict=True):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, torch.tensor(1.0).exp().double() * g)


def test_settings_and_options():
    method = methods.parse("dwa:temperature=1+cagrad:c=0.4")
    assert method.settings() == {"dwa:temperature": 1.0, "cagrad:c": 0.4, "cagrad:rescale": False}
    assert methods.parse(" dwa:temperature=1e+2 + mgda ").weighting.temperature == 100
    with pytest.raises(UsageError, match="belong to one of its parts"):
        methods.get("uw+cagrad", c=0.4)


@pytest.mark.parametrize("make", [methods.get, methods.parse])
@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("uw+dwa", UsageError, r"a weighting and then an aggregator, .* got 'uw' \(weighting\), 'dwa' \(weighting\)"),
        ("pcgrad+cagrad", UsageError, r"got 'pcgrad' \(aggregator\), 'cagrad' \(aggregator\)"),
        ("pcgrad+uw", UsageError, r"got 'pcgrad' \(aggregator\), 'uw' \(weighting\)"),
        ("uw+pcgrad+cagrad", UsageError, r"got 'uw' \(weighting\), 'pcgrad' \(aggregator\), 'cagrad'"),
        ("uw+pcgard", UnknownNameError, "Did you mean 'pcgrad'"),
    ],
)
def test_what_is_no_composition_is_refused(make, name, error, said):
    with pytest.raises(error, match=said):
        make(name)


def test_a_composition_is_no_part_of_another():
    with pytest.raises(UsageError, match=r"'uw\+pcgrad' \(aggregator\)"):
        Composition(methods.get("dwa"), methods.get("uw+pcgrad"))


def test_a_plus_at_the_end_is_an_options():
    alone, composed = methods.parse("mgda:normalize=loss+"), methods.parse("uw+mgda:normalize=loss+")
    assert alone.normalize == composed.aggregator.normalize == "loss+"
    assert composed.weighting.name == "uw"
