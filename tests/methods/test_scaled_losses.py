"""Losses that were multiplied by a number train as those that were not."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recon
from recon import methods
from recon.errors import NonFiniteError, UsageError

TASKS = ("a", "b")
COMPOSED = ["uw+pcgrad", "stch+excessmtl", "imtl-l+graddrop", "gradnorm+mgda:normalize=loss"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})

    def forward(self, x):
        h = self.body(x)
        return {task: head(h) for task, head in self.heads.items()}


def setting(name, seed=0):
    torch.manual_seed(seed)
    net = Net().double()
    name = {"rotograd": "rotograd:layer=body", "gradnorm": "gradnorm:layer=body.2"}.get(name, name)
    method = methods.parse(name)
    method.setup(TASKS)
    method.attach(net)
    return net.double(), method, torch.optim.SGD([*net.parameters(), *method.parameters()], 0.05)


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = {"a": 2 * X[:, :1], "b": X[:, 1:2].sin()}


def losses_of(net):
    return {task: F.mse_loss(out, Y[task]) for task, out in net(X).items()}


def train(name, scaler, told=lambda scaler: scaler):
    """Six steps, between which the scaler changes its mind."""
    net, method, optimizer = setting(name)
    for step in range(6):
        optimizer.zero_grad()
        losses = {task: scaler.scale(loss) for task, loss in losses_of(net).items()}
        weights = recon.backward(losses, net, method, loss_scale=told(scaler))
        scaler.step(optimizer)
        scaler.update(float(2 ** (10 - step)) if scaler.is_enabled() else None)
        if method.needs_new_losses:
            method.after_step({task: loss.detach() for task, loss in losses_of(net).items()})
        method.end_epoch()
    return [*net.parameters(), *method.parameters()], weights


@pytest.mark.parametrize("name", [*methods.names(), *COMPOSED])
def test_a_grad_scaler_changes_nothing(name):
    plain, weights = train(name, torch.amp.GradScaler("cpu", enabled=False))
    scaled, others = train(name, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8)  # a scaler works in float32
    assert {t: w.item() for t, w in others.items()} == pytest.approx(
        {t: w.item() for t, w in weights.items()}, rel=1e-6
    )


@pytest.mark.parametrize("told", [lambda s: s.get_scale(), lambda s: s.scale(torch.ones(()))], ids=["number", "tensor"])
def test_the_number_is_as_good_as_the_scaler(told):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain, _ = train("uw", torch.amp.GradScaler("cpu", enabled=False))
    for p, q in zip(plain, train("uw", scaler, told)[0], strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["uw", "stch", "cagrad", "excessmtl", "rotograd", "uw+graddrop"])
def test_losses_divided_for_accumulation_give_the_mean_of_the_gradients(name):
    net, method, _ = setting(name)
    other, plain, _ = setting(name)
    for _ in range(4):
        recon.backward({t: loss / 4 for t, loss in losses_of(net).items()}, net, method, loss_scale=1 / 4)
        recon.backward(losses_of(other), other, plain)
    for p, q in zip([*net.parameters(), *method.parameters()], [*other.parameters(), *plain.parameters()], strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["pcgrad", "uw+mgda", "gradnorm", "excessmtl", "rotograd", "joint"])
def test_a_scaler_skips_what_overflows_and_goes_on(name):
    net, method, optimizer = setting(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.heads.parameters()]
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        losses = losses_of(net)
        losses["b"] = losses["b"] if factor == 1 else _steep(losses["b"])
        recon.backward({t: scaler.scale(loss) for t, loss in losses.items()}, net, method, loss_scale=scaler)
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(p, v) for p, v in zip(before, net.heads.parameters(), strict=True))
        assert changed == (factor == 1) and scaler.get_scale() == 2.0
    assert all(p.isfinite().all() for p in net.parameters())


def _steep(loss):
    """Of a finite value, with a gradient that is not."""
    return loss + torch.sqrt(0 * loss)


def test_a_number_does_not_hide_what_overflows():
    net, method, _ = setting("pcgrad")
    with pytest.raises(NonFiniteError, match="'b'"):
        recon.backward({"a": losses_of(net)["a"], "b": _steep(losses_of(net)["b"])}, net, method, loss_scale=2.0)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "2", torch.ones(2)], ids=str)
def test_what_is_no_scale_is_refused(bad):
    net, method, _ = setting("uw")
    with pytest.raises(UsageError, match="loss_scale is"):
        recon.backward(losses_of(net), net, method, loss_scale=bad)


@pytest.mark.parametrize(
    ("name", "scale", "warns"),
    [
        ("uw", lambda loss: loss / 4, True),
        ("uw", lambda loss: 4 * loss, True),
        ("stch", torch.amp.GradScaler("cpu").scale, True),
        ("uw", lambda loss: loss, False),
        ("cagrad", lambda loss: loss / 4, False),
        ("joint", lambda loss: loss / 4, False),
    ],
    ids=["uw-divided", "uw-multiplied", "stch-scaler", "uw-plain", "cagrad-divided", "joint-divided"],
)
def test_a_scale_that_nobody_told_of_is_asked_about_once(name, scale, warns, caplog):
    net, method, _ = setting(name)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            recon.backward({task: scale(loss) for task, loss in losses_of(net).items()}, net, method)
    assert len([r for r in caplog.records if "loss_scale" in r.message]) == warns


def test_a_profiler_counts_alike_and_leaves_scaled_gradients():
    net, other = setting("joint")[0], setting("joint")[0]
    scaled, plain = recon.Profiler(net), recon.Profiler(other)
    scaled.backward({t: 512 * loss for t, loss in losses_of(net).items()}, loss_scale=512)
    plain.backward(losses_of(other))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 512 * q.grad)
    assert scaled.conflict_map().scores(0.0) == plain.conflict_map().scores(0.0)
