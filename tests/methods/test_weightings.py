"""What all loss weightings have in common, and the formulas of those that need nothing but the losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchjd.scalarization

import recon
from recon import methods
from recon.errors import UnknownNameError, UsageError
from recon.profiling.profiler import Profiler
from tests.methods.test_methods import TASKS, WEIGHTINGS, saved
from tests.methods.test_step import gradients_by_task, losses_of, model, x

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)
fixtures = (model, x)


def scalars(*values, tasks=TASKS):
    return dict(zip(tasks, map(torch.tensor, values), strict=False))


def step(method, losses, after=0.5):
    """One step of a method, whatever it asks for; what it said, as numbers."""
    if isinstance(method, methods.NormWeighting):
        method.observe_norms({task: 2 * loss + 1 for task, loss in losses.items()})
    total, weights = method.combine(losses)
    if method.needs_new_losses:
        method.after_step({task: loss * after**i for i, (task, loss) in enumerate(losses.items())})
    if total.requires_grad:
        total.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return total.item(), {task: weight.item() for task, weight in weights.items()}


def made(name):
    method = methods.get(name)
    method.setup(TASKS)
    return method


@every_weighting
def test_state_continues_to_the_bit(name):
    method = made(name)
    for epoch in range(3):
        step(method, scalars(1.0 + epoch, 2.0, 4.0))
        method.end_epoch()
    step(method, scalars(3.0, 1.0, tasks=("seg", "normal")))
    resumed = made(name)
    resumed.load_state_dict(saved(method))
    for values in ((1.0, 3.0, 2.0), (2.0, 2.5, 0.5), (0.1, 1.0, 3.0)):
        assert step(resumed, scalars(*values)) == step(method, scalars(*values))
        method.end_epoch()
        resumed.end_epoch()


@every_weighting
def test_an_absent_task_keeps_its_state(name):
    method = made(name)
    for _ in range(2):
        step(method, scalars(1.0, 2.0, 4.0))
    before = method.weights(3).clone()
    _, weights = step(method, scalars(3.0, 1.0, tasks=("seg", "normal")))
    assert list(weights) == ["seg", "normal"]
    assert method.weights(3)[1] == before[1]


@every_weighting
def test_the_global_random_state_is_neither_read_nor_changed(name):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        method = made(name)
        found.append([step(method, scalars(1.0, 2.0, 4.0)) for _ in range(3)])
        assert torch.get_rng_state().equal(before)
    assert found[0] == found[1]


@every_weighting
def test_weights_of_agreeing_tasks_add_up_to_their_number(name):
    """Sum scale: where all tasks have the same loss and gradient, so has the update, T times."""
    method = made(name)
    for _ in range(3):
        _, weights = step(method, scalars(2.0, 2.0, 2.0), after=1.0)
        if name not in ("uw", "imtl-l"):  # which learn the scale of the losses
            assert sum(weights.values()) == pytest.approx(3)


@pytest.mark.parametrize("memory", [None, "exact", "sketch"])
@every_weighting
def test_weights_are_those_of_the_backward_pass(model, x, name, memory):
    method = methods.parse("joint:weights=0.3/1.7" if name == "joint" else name)
    for number in range(3):
        method.end_epoch()
        gradients = gradients_by_task(model, x)
        model.zero_grad()
        profiler = memory and Profiler(model, memory=memory)
        losses = losses_of(model, x)
        weights = recon.backward(losses, model, method, profiler=profiler)
        assert list(weights) == ["a", "b"]
        if number and name not in ("joint", "dwa"):
            assert weights["a"].item() != pytest.approx(1, rel=1e-4)
        for i, p in enumerate(model.parameters()):
            expected = sum(weights[task].double() * gradients[task][i] for task in gradients)
            torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-9)
        if method.needs_new_losses:
            method.after_step({task: loss.detach() * (0.5 if task == "a" else 1) for task, loss in losses.items()})
        with torch.no_grad():
            for p in method.parameters():
                p -= 0.1 * p.grad
                p.grad = None


@pytest.mark.parametrize(
    ("name", "least", "said"),
    [
        ("gradnorm", 0.0, "losses of at least 0 have fallen; those of ['depth'] are not"),
        ("gls", 1e-6, "losses that are above 0; those of ['depth'] are not"),
        ("imtl-l", 0.0, "scales losses of at least 0 to 1; those of ['depth'] are not"),
        ("famo", 0.0, "the logarithms of losses of at least 0; those of ['depth'] are not"),
    ],
)
def test_losses_that_a_method_cannot_weigh_are_refused_by_name(name, least, said):
    method = made(name)
    step(method, scalars(1.0, least, 2.0))
    with pytest.raises(UsageError) as refused:
        step(method, scalars(1.0, least - 1e-6, 2.0))
    assert said in str(refused.value)


# --- joint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", ["0.3/1.7/0", "depth:1.7/seg:0.3/normal:0", [0.3, 1.7, 0], {"depth": 1.7, "normal": 0, "seg": 0.3}]
)
def test_static_weights(weights):
    method = methods.get("joint", weights=weights)
    for use in (method.combine, lambda losses: method(torch.ones(3, 2))):
        with pytest.raises(UsageError, match="call setup"):
            use(scalars(1.0, 2.0, 4.0))
    method.setup(TASKS)
    total, found = method.combine(scalars(1.0, 2.0, 4.0))
    assert total.item() == pytest.approx(0.3 + 3.4)
    assert {task: w.item() for task, w in found.items()} == pytest.approx({"seg": 0.3, "depth": 1.7, "normal": 0})
    total, found = method.combine(scalars(2.0, 1.0, tasks=("depth", "seg")))
    assert total.item() == pytest.approx(0.3 + 3.4) and list(found) == ["depth", "seg"]
    J = torch.randn(3, 5)
    torch.testing.assert_close(method(J), 0.3 * J[0] + 1.7 * J[1])
    if isinstance(weights, str):
        assert methods.parse(f"joint:weights={weights}").settings() == method.settings()


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        ("0.3/1.7", UsageError, "There are 2 weights for the 3 tasks"),
        (0.5, UsageError, "There are 1 weights for the 3 tasks"),
        ("seg:1/dept:1/normal:1", UnknownNameError, "Did you mean 'depth'"),
        ("seg:1/depth:1", UsageError, r"lack the tasks \['normal'\]"),
        ("seg:1/1/1", UsageError, "every task by name and once"),
        ("seg:1/seg:1/depth:1", UsageError, "every task by name and once"),
        ("1/-1/1", UsageError, "at least 0, separated by '/', but one is '-1'"),
        ([1, math.nan, 1], UsageError, "finite numbers of at least 0, .* one is nan"),
        ("1/x/1", UsageError, "one is 'x'"),
        ([1, None, 1], UsageError, "one is None"),
    ],
)
def test_wrong_static_weights_are_refused(weights, error, said):
    with pytest.raises(error, match=said):
        methods.get("joint", weights=weights).setup(TASKS)


@pytest.mark.parametrize("profiled", [False, True])
def test_joint_without_weights_is_the_sum_of_losses_to_the_bit(model, x, profiled):
    model, plain = model.float(), copy.deepcopy(model).float()
    losses = losses_of(model, x.float())
    if profiled:  # whose gradients are added up task by task, as these are
        for loss in losses_of(plain, x.float()).values():
            loss.backward(retain_graph=True)
    else:
        sum(losses_of(plain, x.float()).values()).backward()
    recon.backward(losses, model, methods.get("joint"), profiler=Profiler(model) if profiled else None)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


# --- formulas ---------------------------------------------------------------------------------------------


def test_rlw_is_the_softmax_of_normals():
    """Lin et al. 2022, Algorithm 2, times the number of tasks, from the stream of the seed."""
    stream = torch.Generator().manual_seed(5)
    method = methods.get("rlw", seed=5)
    method.setup(TASKS)
    means = torch.zeros(3)
    for number in range(300):
        drawn = torch.randn(3, generator=stream)
        present = [0, 2] if number % 3 == 1 else [0, 1, 2]
        _, weights = step(method, {TASKS[i]: torch.tensor(1.0) for i in present})
        e = [math.exp(drawn[i]) for i in present]
        assert list(weights.values()) == pytest.approx([len(e) * v / sum(e) for v in e], rel=1e-5)
        means += method.weights(3) / 300
    assert means.tolist() == pytest.approx([1, 1, 1], abs=0.15)


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (1e-10, 1.0, 1e10), (0.5, 0.5)])
def test_gls_is_the_geometric_mean(values):
    weights = step(made("gls"), scalars(*values))[1].values()
    mean = math.exp(sum(map(math.log, values)) / len(values))
    assert list(weights) == pytest.approx([mean / v for v in values], rel=1e-4)
    assert math.prod(weights) == pytest.approx(1, rel=1e-4)


def test_imtl_l_is_the_formula():
    """Liu et al. 2021: Σ e^s L - s."""
    method = made("imtl-l")
    s = [0.5, -1.0, 0.25]
    for parameter, value in zip(method.parameters(), s, strict=True):
        torch.nn.init.constant_(parameter, value)
    losses = scalars(1.0, 2.0, 4.0)
    total, weights = method.combine(losses)
    total.backward()
    assert total.item() == pytest.approx(
        sum(math.exp(a) * v.item() - a for a, v in zip(s, losses.values(), strict=True))
    )
    for parameter, weight, a, v in zip(method.parameters(), weights.values(), s, losses.values(), strict=True):
        assert weight.item() == pytest.approx(math.exp(a))
        assert parameter.grad.item() == pytest.approx(math.exp(a) * v.item() - 1)


@pytest.mark.parametrize("mu", [1.0, 0.01])
def test_stch_is_the_formula(mu):
    """Lin et al. 2024: μ log Σ exp(λ (L - z) / μ) with λ = 1/T, differentiated by hand, times T²."""
    method = methods.get("stch", mu=mu, reference="normal:-1/seg:0.25")
    method.setup(TASKS)
    values, reference = [1.0, 2.0, 1.1], {"seg": 0.25, "depth": 0.0, "normal": -1.0}
    for tasks in (TASKS, ("seg", "normal")):
        losses = {task: v for task, v in zip(TASKS, values, strict=True) if task in tasks}
        y = {task: (v - reference[task]) / len(tasks) / mu for task, v in losses.items()}
        top = max(y.values())
        total = sum(math.exp(v - top) for v in y.values())
        _, weights = step(method, {task: torch.tensor(v) for task, v in losses.items()})
        assert weights == pytest.approx({t: len(tasks) * math.exp(v - top) / total for t, v in y.items()}, rel=1e-4)


# --- FAMO -------------------------------------------------------------------------------------------------


def test_famo_is_torchjds():
    """TorchJD's, with T times its weights, in a training of one parameter vector."""
    ours, theirs = methods.get("famo"), torchjd.scalarization.FAMO(3).double()
    ours.setup(TASKS)
    ours.double()
    centre = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, -2.0]], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def losses():
        return (theta - centre).square().sum(1)

    for _ in range(20):
        (expected,) = torch.autograd.grad(theirs(losses()), theta)
        total, weights = ours.combine(dict(zip(TASKS, losses(), strict=True)))
        (found,) = torch.autograd.grad(total, theta)
        torch.testing.assert_close(found, 3 * expected, rtol=1e-6, atol=1e-9)
        assert sum(weights.values()).item() == pytest.approx(3)
        with torch.no_grad():
            theta -= 0.05 * expected
        theirs.update(losses().detach())
        ours.after_step(dict(zip(TASKS, losses().detach(), strict=True)))
    assert ours.logits.value.std() > 0.1


def test_famo_passes_over_what_took_no_part_in_the_step():
    method = made("famo")
    method.after_step(scalars(1.0, 1.0, 1.0))
    assert method.logits.value.tolist() == [0, 0, 0]
    method.combine(scalars(1.0, 2.0, tasks=("seg", "normal")))
    method.after_step(scalars(0.5, 0.5, 2.0))
    seg, depth, normal = method.logits.value.tolist()
    assert seg < 0 == depth < normal  # seg fell, normal did not
    method.after_step(scalars(0.1, 0.1, 0.1))  # of no step
    assert method.logits.value.tolist() == [seg, depth, normal]


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "gls"])  # which refuses it
@pytest.mark.parametrize("loss", [0.0, 1e-30])
def test_a_loss_of_next_to_nothing_leaves_the_others_their_weights(name, loss):
    """Seven epochs, in which the task is solved, forgotten, and solved again."""
    method = made(name)
    for epoch in range(7):
        for _ in range(3):
            _, weights = step(method, scalars(3e-30 if epoch == 3 else loss, 1.0, 2.0), after=0.9)
            assert all(math.isfinite(weight) for weight in weights.values())
            assert min(weights[task] for task in TASKS[1:]) > 0.05
        method.end_epoch()


@pytest.mark.parametrize("name", ["uw", "imtl-l"])
def test_a_loss_of_zero_says_nothing_of_its_weight(name):
    method = made(name)
    for _ in range(50):
        _, weights = step(method, scalars(0.0, 1.0, 2.0))
    assert weights[TASKS[0]] == 1


def test_dwa_of_an_average_that_is_not_above_zero_or_rises_from_nothing():
    method = made("dwa")
    for losses in [(-1.0, 1e-20, 1.0), (-2.0, 1.0, 1.0)]:
        step(method, scalars(*losses))
        method.end_epoch()
    expected = 3 * torch.softmax(torch.tensor([1.0, 10.0, 1.0]) / 2, dim=0)
    torch.testing.assert_close(method.weights(3), expected)


def test_famo_with_a_loss_of_zero_stays_finite():
    method = made("famo")
    for _ in range(3):
        _, weights = step(method, scalars(0.0, 1.0, 2.0))
        assert sum(weights.values()) == pytest.approx(2)  # as if the task were absent
        assert min(weights.values()) > 0.5
        assert method.logits.value.isfinite().all()
