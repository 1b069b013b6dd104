"""GradNorm against its Algorithm 1 in float64, and where the norms are measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import recon
from recon import methods
from recon.errors import GradientError, UnknownNameError, UsageError
from recon.methods.gradients.norms import layer_norms
from recon.profiling.profiler import Profiler
from recon.support.importing import import_target
from tests.methods.test_step import losses_of, model, x

fixtures = (model, x)
TASKS = ("a", "b")


class Algorithm1:
    """Chen et al. 2018, Algorithm 1: L_grad written down and differentiated by autograd, then Adam, then the sum T."""

    def __init__(self, tasks, alpha, lr):
        self.alpha = alpha
        self.w = torch.ones(len(tasks), dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=lr)
        self.initial = None

    def step(self, losses, W):
        """The weights of this step; afterwards, `w` are those of the next."""
        values = torch.stack(list(losses.values()))
        if self.initial is None:
            self.initial = values.detach()
        weighted = [
            torch.autograd.grad(w * loss, W, create_graph=True) for w, loss in zip(self.w, losses.values(), strict=True)
        ]
        G = torch.stack([torch.cat([g.flatten() for g in parts]).norm() for parts in weighted])
        ratios = values.detach() / self.initial
        target = (G.mean() * (ratios / ratios.mean()) ** self.alpha).detach()
        used = self.w.detach().clone()
        (self.w.grad,) = torch.autograd.grad((G - target).abs().sum(), self.w, retain_graph=True)
        self.adam.step()
        with torch.no_grad():
            self.w *= len(losses) / self.w.sum()
        return used


@pytest.mark.parametrize("profile", [None, {}, {"every": 2}, {"memory": "sketch"}])
@pytest.mark.parametrize(("alpha", "layer"), [(1.5, ""), (0.0, ""), (0.5, "conv")])
def test_steps_are_those_of_algorithm_1(model, x, alpha, layer, profile):
    method = methods.get("gradnorm", alpha=alpha, lr=0.1, layer=layer)
    method.setup(TASKS)
    method.double()
    profiler = None if profile is None else Profiler(model, **profile)
    oracle = Algorithm1(TASKS, alpha, lr=0.1)
    W = list((model.conv if layer else model.norm).parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(6):
        losses = losses_of(model, x)
        expected = oracle.step(losses, W)
        plain = torch.autograd.grad(sum(expected * torch.stack(list(losses.values()))), W, retain_graph=True)
        optimizer.zero_grad()
        weights = recon.backward(losses, model, method, profiler=profiler)
        torch.testing.assert_close(torch.stack(list(weights.values())), expected, rtol=1e-9, atol=1e-12)
        for parameter, gradient in zip(W, plain, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)
        optimizer.step()
    assert (oracle.w - 1).abs().max() > 0.02
    assert method.weights(2).sum().item() == pytest.approx(2)


def test_given_initial_losses_and_measured_ones():
    """By Algorithm 1 at T = 2 with the ratios written out: who is behind is pulled up."""
    for initial, expected in [
        (None, [1.0, 2.0]),
        ("4/8", [4.0, 8.0]),
        ({"b": math.log(10)}, [1.0, math.log(10)]),
        ("a:0", [1.0, 2.0]),
        ("log(13)/1.5", [math.log(13), 1.5]),
    ]:
        method = methods.get("gradnorm", initial=initial)
        method.setup(TASKS)
        for losses in ((1.0, 2.0), (0.5, 0.4)):
            method.observe_norms({task: torch.tensor(1.0) for task in TASKS})
            method.combine(dict(zip(TASKS, map(torch.tensor, losses), strict=True)))
        assert method.initial.tolist() == pytest.approx(expected)
        # The norms were equal: only the rates tell the tasks apart.
        behind = 0.5 / expected[0] - 0.4 / expected[1]
        first, second = method.weights(2).tolist()
        if initial is None:
            assert math.copysign(1, first - second) == math.copysign(1, behind)
    with pytest.raises(UsageError, match="There are 3 initial losses for the 2 tasks"):
        methods.get("gradnorm", initial="1/2/3").setup(TASKS)


def test_absent_tasks_and_a_task_alone(model, x):
    method = methods.get("gradnorm", lr=0.1)
    method.setup(("a", "b", "c"))
    recon.backward(losses_of(model, x), model, method)
    weights = method.weights(3).tolist()
    assert weights[2] == 1 and sum(weights) == pytest.approx(3) and weights[0] != 1
    alone = recon.backward({"b": losses_of(model, x)["b"]}, model, method)
    assert alone["b"].item() == pytest.approx(weights[1])
    assert method.weights(3).tolist() == weights
    assert method.initial.isnan().tolist() == [False, False, True]


def test_losses_and_gradients_of_zero_stay_finite(model, x):
    method = methods.get("gradnorm")
    for scale in (0.0, 1.0, 0.0):
        losses = {task: scale * loss for task, loss in losses_of(model, x).items()}
        weights = recon.backward(losses, model, method)
        assert sum(weights.values()).item() == pytest.approx(2)
    assert method.initial.tolist() == pytest.approx([loss.item() for loss in losses_of(model, x).values()])


def test_a_weight_stays_above_zero():
    method = methods.get("gradnorm", lr=0.9, alpha=0.0)
    method.setup(TASKS)
    for _ in range(5):
        method.observe_norms({"a": torch.tensor(100.0), "b": torch.tensor(1e-3)})
        method.combine({task: torch.tensor(1.0) for task in TASKS})
        assert (method.weights(2) > 0).all() and method.weights(2).sum().item() == pytest.approx(2)


def test_combine_without_norms_is_refused():
    method = methods.get("gradnorm")
    method.setup(TASKS)
    with pytest.raises(UsageError, match="call observe_norms before combine"):
        method.combine({task: torch.tensor(1.0) for task in TASKS})


# --- the norms --------------------------------------------------------------------------------------------


def autograd_norms(losses, parameters):
    found = {}
    for task, loss in losses.items():
        parts = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[task] = torch.cat([part.flatten() for part in parts]).norm().item()
    return found


def assert_measured_in(losses, model, layer, name=""):
    expected = autograd_norms(losses, list(layer.parameters()))
    found = {task: norm.item() for task, norm in layer_norms(losses, model, name).items()}
    assert found == pytest.approx(expected, rel=1e-9)


class Winding(nn.Module):
    """Layers in another order than they are used in, a skip around them, and one that a single task uses last."""

    def __init__(self):
        super().__init__()
        self.third, self.first, self.second, self.only_a = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        first = torch.tanh(self.first(x))
        features = first + torch.tanh(self.third(torch.tanh(self.second(first))))
        return {"a": self.only_a(features), "b": features[:, :2] + first[:, :2]}


def test_the_last_shared_layer_is_the_one_used_last(model, x):
    assert_measured_in(losses_of(model, x), model, model.norm)
    assert_measured_in(losses_of(model, x), model, model.conv, "conv")
    torch.manual_seed(0)
    winding = Winding().double()
    losses = losses_of(winding, torch.randn(5, 4, dtype=torch.float64))
    assert_measured_in(losses, winding, winding.third)
    winding.third.requires_grad_(False)
    losses = losses_of(winding, torch.randn(5, 4, dtype=torch.float64))
    assert_measured_in(losses, winding, winding.second)


def test_a_branched_layers_copies_are_not_shared(model, x):
    branched = recon.convert(model, recon.BranchPlan.per_task(["norm"], TASKS), x[:4]).eval()
    assert_measured_in(losses_of(branched, x), branched, branched.conv)
    with pytest.raises(UsageError, match=r"losses of \['b'\] have no gradient in layer 'norm.branches.a'"):
        layer_norms(losses_of(branched, x), branched, "norm.branches.a")
    everything = recon.convert(model, recon.BranchPlan.per_task(["conv", "norm"], TASKS), x[:4]).eval()
    with pytest.raises(UsageError, match=r"No layer is shared by all of the tasks \['a', 'b'\]"):
        recon.backward(losses_of(everything, x), everything, methods.get("gradnorm"))


def test_names_and_gradients_that_cannot_be_used(model, x):
    with pytest.raises(UnknownNameError, match="Did you mean 'norm'"):
        recon.backward(losses_of(model, x), model, methods.get("gradnorm", layer="nrom"))
    losses = losses_of(model, x)
    with pytest.raises(GradientError, match=r"tasks \['b'\] are not finite in layer 'norm'"):
        layer_norms({"a": losses["a"], "b": losses["b"] * math.nan}, model)
    assert layer_norms({"a": losses["a"]}, model) == {}


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_of_any_size(model, x, scale):
    model.float()
    losses = {task: scale * loss for task, loss in losses_of(model, x.float()).items()}
    expected = autograd_norms(losses_of(model, x.float()), list(model.norm.parameters()))
    found = layer_norms(losses, model)
    assert {t: norm.item() / scale for t, norm in found.items()} == pytest.approx(expected, rel=1e-4)


def test_activation_checkpoints_do_not_move_statistics(x):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

        def forward(self, x):
            part = nn.Sequential(self.conv, self.norm, nn.Tanh(), self.last)
            features = checkpoint(part, x, use_reentrant=False).mean(dim=(2, 3))
            return {task: head(features) for task, head in self.heads.items()}

    statistics = []
    for method in ("joint", "gradnorm"):
        torch.manual_seed(0)
        saving = Saving().double()
        recon.backward(losses_of(saving, x), saving, methods.get(method))
        statistics.append([buffer.clone() for buffer in saving.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*statistics, strict=True))


def test_the_papers_toy_problem():
    """Section 4: the task-normalised test loss is lower than with equal weights, and the weights settle down."""
    toy = import_target(str(Path(__file__).parents[2] / "examples" / "gradnorm_toy.py"))
    sigmas = [1, 30, 3, 10]
    equal = toy.train(methods.get("joint"), sigmas, steps=250, look_every=50)
    gradnorm = toy.train(methods.get("gradnorm", alpha=0.12, lr=0.02), sigmas, steps=250, look_every=50)
    assert gradnorm.losses[-1] < 0.97 * equal.losses[-1]
    moved = [(new - old).abs().max().item() for old, new in zip(gradnorm.weights, gradnorm.weights[1:], strict=False)]
    assert moved[-1] < 0.3 * moved[0]
    by_scale = [gradnorm.weights[-1][sigmas.index(sigma)].item() for sigma in sorted(sigmas)]
    assert by_scale == sorted(by_scale, reverse=True)  # the louder a task, the smaller its weight
