"""What people put around a training loop, put around a profiled one.

Each loop is run twice: once with `sum(losses).backward()`, and once with `profiler.backward(losses)` in its place.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import recon
from recon import methods
from recon.errors import ReconError
from tests import oracle
from tests.profiling.test_profiler_zoo import (
    AGGREGATORS,
    assert_gradients_close,
    assert_map,
    assert_same_pairs,
    assert_states_close,
    cosines_of,
    fresh,
    gradients_of,
)
from tests.zoo import TASKS, ZOO, PlainConv, image

Backward = Callable[[Mapping[str, Tensor]], None]
Loop = Callable[[nn.Module, Backward], None]


class Net(nn.Module):
    """Smooth and without batch norm, so that trajectories can be compared; `extra` serves a and b, `only` a alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.extra, self.only = nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
        extra = torch.tanh(self.extra(h))
        values = {"a": torch.tanh(self.only(extra)), "b": extra + h, "c": h}
        return {task: self.heads[task](value) for task, value in values.items()}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)


def losses_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs = model(x)
    return {task: oracle.loss_of(outputs[task], task) for task in TASKS}


class Plain:
    """`sum(losses).backward()`, after a full backward for each task, which tells what the profiler must count."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[dict[str, dict[tuple[str, str], float]]] = []
        self.skipped = 0

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        kept = [(p, p.grad) for p in self.model.parameters()]
        found = {}
        for task, loss in sorted(losses.items()):
            self.model.zero_grad()
            loss.backward(retain_graph=True)
            found[task] = {key: g.to_dense() for key, g in gradients_of(self.model).items()}
        for p, gradient in kept:
            p.grad = gradient
        if all(g.isfinite().all() for gradients in found.values() for g in gradients.values()):
            self.steps.append(cosines_of(self.model, found))
        else:
            self.skipped += 1
        sum(losses.values()).backward()


def check(loop: Loop, make: Callable[[], nn.Module] = net, tolerance: float = 1e-11) -> tuple[nn.Module, Plain]:
    """Run a loop with and without a profiler, and compare what was counted and how the training ended.

    Sketches are compared by where they see a pair, not by its cosine.
    """
    plain_model = make()
    plain = Plain(plain_model)
    torch.manual_seed(0)
    loop(plain_model, plain.backward)
    maps = {}
    for memory in ("exact", "sketch"):
        model = make()
        profiler = recon.Profiler(model, threshold=-0.02, tasks=TASKS, memory=memory)
        torch.manual_seed(0)
        loop(model, profiler.backward)
        assert_states_close(model, plain_model, tolerance)
        cmap = maps[memory] = profiler.conflict_map()
        assert (cmap.steps, cmap.skipped) == (len(plain.steps) + plain.skipped, plain.skipped)
        cmap.steps, cmap.skipped = len(plain.steps), 0
    assert_map(maps["exact"], plain.steps)
    assert_same_pairs(maps["sketch"], maps["exact"])
    return model, plain


# Loops.


def with_optimizer(make: Callable[..., torch.optim.Optimizer], **options: object) -> Loop:
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = make(model.parameters(), **options)
        for x in batches(5):
            optimizer.zero_grad()
            backward(losses_of(model, x))
            optimizer.step()

    return loop


@pytest.mark.parametrize("kernel", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.Adam, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_optimizers(make, kernel):
    check(with_optimizer(make, foreach=kernel == "foreach", fused=kernel == "fused"))


def test_an_optimizer_that_calls_the_backward_several_times_a_step():
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        for x in batches(3):

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                losses = losses_of(model, x)
                total = sum(losses.values()).detach()
                backward(losses)
                return total

            optimizer.step(closure)

    _, plain = check(loop, tolerance=1e-9)
    assert len(plain.steps) > 3  # every backward counts


def test_parameter_groups_clipping_and_a_schedule():
    def loop(model: nn.Module, backward: Backward) -> None:
        heads = list(model.heads.parameters())
        trunk = [p for p in model.parameters() if all(p is not head for head in heads)]
        groups = [{"params": heads, "lr": 0.1, "weight_decay": 0.0}, {"params": trunk}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.02], total_steps=6)
        average = AveragedModel(model)
        for x in batches(6):
            optimizer.zero_grad()
            backward(losses_of(model, x))
            nn.utils.clip_grad_norm_(trunk, 0.05)
            nn.utils.clip_grad_value_(heads, 0.01)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)

    check(loop)


def test_profiling_every_other_step():
    plain_model, model = net(), net()
    plain, profiler = Plain(plain_model), recon.Profiler(model, every=2)
    sgd_loop(plain_model, plain.backward)
    sgd_loop(model, profiler.backward)
    assert_states_close(model, plain_model, 1e-11)
    assert_map(profiler.conflict_map(), plain.steps[::2])


@pytest.mark.parametrize("to_none", [True, False])
def test_gradient_accumulation(to_none):
    """Every micro-batch counts as a step: its gradients are what is compared, not their sum."""

    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number, x in enumerate(batches(9)):
            backward({task: loss / 3 for task, loss in losses_of(model, x).items()})
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)

    _, plain = check(loop)
    assert len(plain.steps) == 9


def test_gradients_accumulate_in_place():
    """As autograd does it: `.grad` may be a view of a buffer that somebody else reads."""
    model = net()
    profiler = recon.Profiler(model)
    total = sum(p.numel() for p in model.parameters())
    buffer = torch.zeros(total, dtype=torch.float64)
    for p, part in zip(model.parameters(), buffer.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = part.view(p.shape)
    x = next(batches(1))
    profiler.backward(losses_of(model, x))
    plain = net()
    sum(losses_of(plain, x).values()).backward()
    oracle.assert_close(buffer, torch.cat([p.grad.flatten() for p in plain.parameters()]), "buffer", 1e-12)


def test_freezing_half_way():
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.norm.bias.requires_grad_(False)
        for number, x in enumerate(batches(9)):
            model.first.requires_grad_(number < 3)
            model.second.weight.requires_grad_(number >= 6)
            optimizer.zero_grad()
            backward(losses_of(model, x))
            optimizer.step()

    model, plain = check(loop)
    assert [("first" in step, bool(step["first"])) for step in plain.steps] == [(True, n < 3) for n in range(9)]
    assert torch.equal(model.norm.bias, net().norm.bias)


def test_a_trunk_that_is_frozen_throughout():
    model = net()
    for name in ("first", "norm", "second"):
        model.get_submodule(name).requires_grad_(False)
    profiler = recon.Profiler(model)
    profiler.backward(losses_of(model, next(batches(1))))
    cmap = profiler.conflict_map()
    assert {layer.name: layer.observed.sum(axis=0).tolist() for layer in cmap.layers} == {"extra": [1, 0, 0]}


def test_batches_that_lack_tasks_in_any_order():
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        chosen = [tasks for count in (1, 2, 3) for tasks in itertools.permutations(TASKS, count)]
        for tasks, x in zip(chosen, batches(len(chosen)), strict=True):
            losses = losses_of(model, x)
            optimizer.zero_grad()
            backward({task: losses[task] for task in tasks})
            optimizer.step()

    _, plain = check(loop)
    assert {len(step["first"]) for step in plain.steps} == {0, 1, 3}


# Losses.


def plain_loop(losses: Callable[[nn.Module, Tensor], dict[str, Tensor]], steps: int = 4) -> Loop:
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches(steps):
            optimizer.zero_grad()
            backward(losses(model, x))
            optimizer.step()

    return loop


def sharing_terms(model, x):
    losses = losses_of(model, x)
    regularizer = 0.1 * sum(p.square().sum() for p in model.second.parameters())
    return {"a": losses["a"] + regularizer, "b": losses["b"] * losses["a"] - regularizer, "c": losses["c"].exp()}


def the_same_loss_twice(model, x):
    losses = losses_of(model, x)
    return {"a": losses["a"], "b": losses["a"], "c": losses["c"]}


def a_batch_for_each_task(model, x):
    return {task: losses_of(model, x * scale)[task] for task, scale in zip(TASKS, (1.0, 0.5, -2.0), strict=True)}


def one_loss_of_zero(model, x):
    losses = losses_of(model, x)
    return losses | {"b": (model(x)["b"] - 1e3).clamp(min=0).sum()}


def gradient_penalty(model, x):
    x = x.clone().requires_grad_()
    losses = losses_of(model, x)
    (inwards,) = torch.autograd.grad(losses["a"], x, create_graph=True)
    return losses | {"b": losses["b"] + inwards.square().sum()}


def outputs_changed_in_place(model, x):
    outputs = model(x)
    outputs["a"].sub_(x[:, :2]).tanh_()
    outputs["b"][:, 0].mul_(outputs["c"].detach()[:, 1])
    both = torch.stack([outputs["a"], outputs["c"]])
    both[1] *= 2
    a, c = both.unbind()
    return {task: oracle.loss_of(out, task) for task, out in {"a": a, "b": outputs["b"], "c": c}.items()}


def far_from_one(model, x):
    losses = losses_of(model, x)
    return {"a": losses["a"] * 1e-9, "b": losses["b"] * 1e-3, "c": losses["c"] * 10}


@pytest.mark.parametrize(
    "losses",
    [
        sharing_terms,
        the_same_loss_twice,
        a_batch_for_each_task,
        one_loss_of_zero,
        gradient_penalty,
        outputs_changed_in_place,
        far_from_one,
    ],
)
def test_losses(losses):
    _, plain = check(plain_loop(losses))
    seen = {pair for step in plain.steps for pair in step["first"]}
    assert seen == ({("a", "c")} if losses is one_loss_of_zero else {("a", "b"), ("a", "c"), ("b", "c")})


def test_layers_that_tasks_reach_in_part():
    """A layer's gradient is that of all its parameters: what one task alone reaches counts in the norm."""

    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        h, second, norm = torch.tanh(model.first(x)), model.second, model.norm
        outputs = {
            "a": torch.tanh(second(h)) * (1 + norm.bias),
            "b": nn.functional.linear(h, second.weight) * norm.weight,
            "c": torch.tanh(h + second.bias),
        }
        return {task: oracle.loss_of(model.heads[task](out), task) for task, out in outputs.items()}

    _, plain = check(plain_loop(losses))
    for step in plain.steps:
        assert step["norm"] == {("a", "b"): 0.0} and step["second"]["b", "c"] == 0.0
        assert step["second"]["a", "b"] != 0.0


@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e22])
def test_many_tasks_and_a_large_layer(scale):
    """Sums may be of float32, but no worse: these cosines with the first task lie on thresholds, almost."""
    torch.manual_seed(0)
    layer = nn.Linear(500, 600, bias=False)
    basis, _ = torch.linalg.qr(torch.randn(layer.weight.numel(), 2, dtype=torch.float64))
    wanted = [1.0] + [edge / 10 + side for edge in (-5, -3, -1, 1, 3) for side in (-3e-6, 3e-6)]
    vectors = {
        str(n): (scale * (c * basis[:, 0] + (1 - c * c) ** 0.5 * basis[:, 1])).float().view_as(layer.weight)
        for n, c in enumerate(wanted)
    }
    profiler = recon.Profiler(nn.Sequential(layer))
    profiler.backward({task: (layer.weight * vector).sum() for task, vector in vectors.items()})
    found = {task: {"0.weight": vector} for task, vector in vectors.items()}
    assert_map(profiler.conflict_map(), [cosines_of(profiler.model, found)], tolerance=1e-6)


@pytest.mark.parametrize("power", range(-60, 61, 20))
@pytest.mark.parametrize("scaled", ["a", "abc"])
def test_loss_scaling_changes_no_count(power, scaled):
    """A power of two scales a float32 gradient without rounding it."""
    counted = []
    for factor in (1.0, 2.0**power):
        model = net(torch.float32)
        profiler = recon.Profiler(model, threshold=-0.02)
        for x in batches(20, torch.float32):
            losses = losses_of(model, x)
            profiler.backward({task: loss * (factor if task in scaled else 1.0) for task, loss in losses.items()})
        counted.append(profiler.conflict_map())
    for one, other in zip(*(cmap.layers for cmap in counted), strict=True):
        assert one.histogram.tolist() == other.histogram.tolist() and one.histogram.sum() > 0
        assert one.conflicts.tolist() == other.conflicts.tolist()


@pytest.mark.parametrize("method", [None, *AGGREGATORS])
def test_a_loss_with_parameters_of_its_own(method):
    """Learned temperatures, centres and weights lie outside the model, and train with it."""
    found = []
    for profiled in (False, True):
        model, x = net(), next(batches(1))
        temperature = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))
        losses = losses_of(model, x)
        losses["a"] = losses["a"] * temperature[0] + temperature[1].log()
        if profiled:
            recon.backward(losses, model, method and methods.get(method), profiler=recon.Profiler(model))
        else:
            sum(losses.values()).backward()
        found.append(temperature.grad)
    torch.testing.assert_close(*found)


def test_inputs_that_require_a_gradient():
    """Adversarial training reads it."""
    found = []
    for profiled in (False, True):
        model, x = net(), next(batches(1)).requires_grad_()
        losses = losses_of(model, x)
        backward = recon.Profiler(model).backward if profiled else lambda losses: sum(losses.values()).backward()
        backward(losses)
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_activations_that_retain_their_gradient():
    found = []
    for profiled in (False, True):
        model, x = net(), next(batches(1))
        kept = []
        model.second.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        losses = losses_of(model, x)
        kept[0].retain_grad()
        backward = recon.Profiler(model).backward if profiled else lambda losses: sum(losses.values()).backward()
        backward(losses)
        found.append(kept[0].grad)
    torch.testing.assert_close(*found)


# Precision.


def gradients_from_the_same_graph(model: nn.Module, losses: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    named = dict(model.named_parameters())
    found = {}
    for task, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        found[task] = {key: g for key, g in zip(named, gradients, strict=True) if g is not None}
    return found


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "inside"])
@pytest.mark.parametrize("name", ["PlainConv", "ResidualNet", "TransformerEncoder", "Recurrent", "ParameterLists"])
def test_autocast(name, inside):
    """The cosines are exact ones of the gradients that autocast gives, whatever those are."""
    model = fresh(name, torch.float32)
    profiler = recon.Profiler(model)
    steps = []
    for seed in range(5):
        torch.manual_seed(seed)
        x = ZOO[name].inputs(6).float()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, x)
        found = gradients_from_the_same_graph(model, losses)
        steps.append(cosines_of(model, found))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            profiler.backward(losses)
        for key, p in model.named_parameters():
            if p.grad is not None:
                assert p.grad.dtype == torch.float32
                terms = [gradients[key] for gradients in found.values() if key in gradients]
                oracle.assert_close(p.grad, sum(terms), key, 1e-6)
    assert_map(profiler.conflict_map(), steps)


@pytest.mark.parametrize("method", AGGREGATORS)
def test_a_gradient_method_inside_autocast_is_computed_in_full_precision(method):
    x = next(batches(1, torch.float32))
    found = []
    for inside in (False, True):
        model = net(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            recon.backward(losses, model, methods.get(method), profiler=recon.Profiler(model))
        found.append(gradients_of(model))
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(dtype):
    """The sums are not of the gradients' own precision, in which these cosines would be off by 0.1."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(200, 200)}).to(dtype)
    profiler = recon.Profiler(model)
    steps = []
    for _ in range(5):
        vectors = dict(zip(TASKS, torch.randn(3, 200, 201, dtype=torch.float64).to(dtype), strict=True))
        layer = model["layer"]
        losses = {t: (layer.weight * v[:, :-1]).sum() + (layer.bias * v[:, -1]).sum() for t, v in vectors.items()}
        model.zero_grad()
        found = gradients_from_the_same_graph(model, losses)
        steps.append(cosines_of(model, found))
        profiler.backward(losses)
        assert model["layer"].weight.grad.dtype == dtype
        total = sum(gradients["layer.weight"].double() for gradients in found.values())
        assert (model["layer"].weight.grad.double() - total).abs().max() <= total.abs().max() * torch.finfo(dtype).eps
    assert_map(profiler.conflict_map(), steps)


def test_layers_of_several_precisions():
    def make() -> nn.Module:
        model = net()
        model.first.float()
        model.norm.bias.data = model.norm.bias.data.float()
        model.first.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        model.norm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        model.norm.forward = lambda x: nn.functional.layer_norm(x, (8,), model.norm.weight, model.norm.bias.double())
        return model

    check(with_optimizer(partial(torch.optim.SGD, lr=0.1)), make, tolerance=1e-6)


def test_complex_parameters():
    """The gradients of a complex layer are vectors of its real and imaginary parts."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.heads = nn.Linear(6, 8), nn.ModuleDict({t: nn.Linear(8, 2) for t in TASKS})
            self.mix = nn.ParameterList([torch.randn(5, 5, dtype=torch.complex64)])

        def forward(self, x):
            h = torch.fft.irfft(torch.fft.rfft(torch.tanh(self.first(x))) @ self.mix[0], n=8)
            return {task: head(h) for task, head in self.heads.items()}

    torch.manual_seed(0)
    model = Spectral()
    profiler = recon.Profiler(model)
    losses = losses_of(model, torch.randn(8, 6))
    found = gradients_from_the_same_graph(model, losses)
    real = {t: {k: torch.view_as_real(g) if g.is_complex() else g for k, g in gs.items()} for t, gs in found.items()}
    profiler.backward(losses)
    assert_map(profiler.conflict_map(), [cosines_of(model, real)])
    expected = sum(gradients["mix.0"] for gradients in found.values())
    torch.testing.assert_close(model.mix[0].grad, expected)


# Steps that are not finite.


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layer", ["first.weight", "second.bias", "only.weight", "heads.c.bias"])
def test_a_step_with_one_gradient_that_is_not_finite(layer, value):
    def loop(model: nn.Module, backward: Backward) -> None:
        for number, x in enumerate(batches(6)):
            handle = model.get_parameter(layer).register_hook(partial(overflow, number))
            model.zero_grad()
            backward(losses_of(model, x))
            handle.remove()
        model.zero_grad()

    def overflow(number: int, gradient: Tensor) -> Tensor:
        if number not in (2, 5):
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    _, plain = check(loop)
    assert plain.skipped == 2


def test_a_step_of_which_one_task_overflows():
    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        found = losses_of(model, x)
        return found | {"c": found["c"] * 1e300 * 1e300} if x[0, 0] > 0 else found

    def loop(model: nn.Module, backward: Backward) -> None:
        for x in batches(8):
            model.zero_grad()
            backward(losses(model, x))

    _, plain = check(loop)
    assert 0 < plain.skipped < 8


def test_a_gradient_scaler():
    """As with float16: it scales the losses, leaves out the steps that overflow, and finds its scale."""

    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-10, growth_interval=100)
        for x in batches(8, torch.float32):
            optimizer.zero_grad()
            backward({task: scaler.scale(loss * 2**30) for task, loss in losses_of(model, x).items()})
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())

    scales: list[float] = []
    _, plain = check(loop, partial(net, torch.float32), tolerance=1e-5)
    assert 0 < plain.skipped < 8 and scales == [2.0 ** (120 - 10 * plain.skipped)] * 3


# What is put on the model.


def with_hook(register: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net()
        register(model)
        return model

    return make


def double(gradient: Tensor) -> None:
    gradient.mul_(2)


sgd_loop = with_optimizer(partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.second.weight.register_hook(lambda gradient: gradient * -2),
        lambda model: model.second.weight.register_hook(double),
        lambda model: model.first.bias.register_hook(lambda gradient: gradient.flip(0)),
        lambda model: model.second.register_full_backward_hook(lambda m, inwards, out: (inwards[0] * 3,)),
        lambda model: model.extra.register_full_backward_pre_hook(lambda m, out: (out[0].flip(1),)),
    ],
    ids=["parameter", "in place", "bias", "backward hook", "backward pre-hook"],
)
def test_hooks(register):
    check(sgd_loop, with_hook(register))


def test_a_hook_that_clips_sees_the_gradient_of_one_task_at_a_time():
    model, x = net(), next(batches(1))
    model.second.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    found = gradients_from_the_same_graph(model, losses_of(model, x))
    assert all(g["second.weight"].abs().max() == 1e-3 for g in found.values())
    profiler = recon.Profiler(model)
    profiler.backward(losses_of(model, x))
    assert_map(profiler.conflict_map(), [cosines_of(model, found)])
    assert_gradients_close(model, {k: sum(g[k] for g in found.values() if k in g) for k, _ in model.named_parameters()})


def test_a_backward_that_fails_leaves_nothing_behind():
    plain, model, x = net(), net(), next(batches(1))
    calls = itertools.count()

    def fail_for_the_second_task(gradient: Tensor) -> None:
        if next(calls) == 1:
            raise ZeroDivisionError

    handle = model.first.weight.register_hook(fail_for_the_second_task)
    profiler = recon.Profiler(model)
    with pytest.raises(ZeroDivisionError):
        profiler.backward(losses_of(model, x))
    handle.remove()
    assert not gradients_of(model)
    expected = Plain(plain)
    expected.backward(losses_of(plain, x))
    profiler.backward(losses_of(model, x))
    assert_gradients_close(model, gradients_of(plain))
    assert_map(profiler.conflict_map(), expected.steps)
    model.zero_grad()
    sum(losses_of(model, x).values()).backward()
    assert_gradients_close(model, gradients_of(plain))


def test_a_hook_that_runs_once_a_gradient_is_accumulated():
    """Optimizers that step within the backward live in these."""

    def loop(model: nn.Module, backward: Backward) -> None:
        def step(parameter: nn.Parameter) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for x in batches(3):
            backward(losses_of(model, x))

    plain, model, initial = net(), net(), net()
    loop(plain, lambda losses: sum(losses.values()).backward())
    loop(model, recon.Profiler(model).backward)
    assert not torch.equal(plain.first.weight, initial.first.weight)
    assert_states_close(model, plain, 1e-11)


class Recomputed(Net):
    """Keeps nothing for the backward of its shared part but the input; dropout is drawn again from the same state."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        h = checkpoint(lambda x: nn.functional.dropout(torch.tanh(self.first(x)), 0.3), x, use_reentrant=self.reentrant)
        h = checkpoint(lambda h: torch.tanh(self.second(self.norm(h))), h, use_reentrant=self.reentrant)
        return {task: self.heads[task](h) for task in TASKS}


def recomputed(reentrant: bool) -> nn.Module:
    torch.manual_seed(0)
    return Recomputed(reentrant).double()


def test_activation_checkpointing():
    check(sgd_loop, partial(recomputed, reentrant=False))


def test_reentrant_checkpointing_is_refused_or_works():
    """Its parameters are not in the graph, and torch has no gradient of single tasks there."""
    model, plain = (recomputed(reentrant=True).eval() for _ in range(2))
    x = next(batches(1))
    sum(losses_of(plain, x).values()).backward()
    try:
        recon.Profiler(model).backward(losses_of(model, x))
    except ReconError as error:
        assert "checkpoint" in str(error)
    else:
        assert_gradients_close(model, gradients_of(plain))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*is deprecated")
def test_weights_that_are_computed_from_others():
    def make() -> nn.Module:
        model = net()
        nn.utils.parametrizations.orthogonal(model.second)
        nn.utils.parametrizations.weight_norm(model.extra)
        nn.utils.weight_norm(model.first)
        prune.random_unstructured(model.heads["a"], "weight", 0.5)
        return model

    check(sgd_loop, make)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.own = nn.Embedding(9, 6, sparse=True), nn.Embedding(9, 2, sparse=True)
        self.rest = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = (x.abs() * 4).long().clamp(max=8)
        outputs = self.rest(self.words(tokens).mean(1))
        return outputs | {"a": outputs["a"] + self.own(tokens[:, 0])}


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().double()


def test_sparse_gradients():
    check(sgd_loop, words)


def test_an_optimizer_of_sparse_gradients():
    def loop(model: nn.Module, backward: Backward) -> None:
        optimizer = torch.optim.SparseAdam([model.words.weight, model.own.weight], lr=0.01)
        for x in batches(3):
            model.zero_grad()
            backward(losses_of(model, x))
            optimizer.step()

    check(loop, words)


@pytest.mark.parametrize("format_", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_formats(format_):
    """One task's gradient lies in memory as the convolution leaves it, the other's as the regularizer does."""
    model, plain = (fresh("PlainConv").to(memory_format=format_) for _ in range(2))
    x = image(6).contiguous(memory_format=torch.channels_last)
    expected, profiler = Plain(plain), recon.Profiler(model)
    expected.backward(pushed_losses(plain, x))
    profiler.backward(pushed_losses(model, x))
    assert_map(profiler.conflict_map(), expected.steps)
    assert_gradients_close(model, gradients_of(plain))


@pytest.mark.parametrize(
    "format_",
    [
        torch.channels_last,
        torch.contiguous_format,
    ],
    ids=str,
)
def test_gradients_lie_in_memory_as_their_parameters_do(format_):
    """As autograd leaves them; optimizers fall back to slower kernels where they do not."""
    model = fresh("PlainConv").to(memory_format=format_)
    x = image(6).contiguous(memory_format=torch.channels_last)
    recon.Profiler(model).backward(pushed_losses(model, x))
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def pushed_losses(model: PlainConv, x: Tensor) -> dict[str, Tensor]:
    weight = model.body[1][0].weight
    generator = torch.Generator().manual_seed(3)
    push = (weight * torch.randn(weight.shape, generator=generator, dtype=torch.float64)).sum()
    found = losses_of(model, x)
    return found | {"b": push + 0 * found["b"], "c": found["c"] + 0.1 * push}


has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=(pytest.mark.slow, has_compiler))]
)
def test_a_compiled_model(backend):
    torch.compiler.reset()
    plain, model = net(), net()
    compiled = torch.compile(model, backend=backend)
    expected, profiler = Plain(plain), recon.Profiler(compiled, threshold=-0.02)
    for x in batches(3):
        for one, backward, parameters in ((plain, expected.backward, plain), (compiled, profiler.backward, model)):
            one.zero_grad()
            backward(losses_of(one, x))
            with torch.no_grad():
                for p in parameters.parameters():
                    p -= 0.1 * p.grad
    cmap = profiler.conflict_map()
    assert [layer.name for layer in cmap.layers] == ["first", "norm", "second", "extra"]
    assert_map(cmap, expected.steps)
    assert_states_close(model, plain, 1e-11)


def test_a_compiled_part_of_a_model():
    torch.compiler.reset()

    def make() -> nn.Module:
        model = net()
        model.second.compile(backend="aot_eager")
        return model

    model, plain = make(), net()
    expected, profiler = Plain(plain), recon.Profiler(model)
    x = next(batches(1))
    expected.backward(losses_of(plain, x))
    profiler.backward(losses_of(model, x))
    assert_map(profiler.conflict_map(), expected.steps)
    assert_gradients_close(model, gradients_of(plain))


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "within",
    [
        deterministic,
        default_dtype,
        torch.autograd.detect_anomaly,
        torch.autograd.graph.save_on_cpu,
        partial(torch.autograd.set_multithreading_enabled, False),
        torch.enable_grad,
    ],
    ids=lambda within: getattr(within, "__name__", "one thread"),
)
def test_within(within):
    def loop(model: nn.Module, backward: Backward) -> None:
        with within():
            sgd_loop(model, backward)

    check(loop)


# Changes of the model under the profiler's eyes.


def test_layers_that_the_model_gets_later():
    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(model.first(x))
        if hasattr(model, "late"):
            h = torch.tanh(model.late(h))
        return {task: oracle.loss_of(model.heads[task](h), task) for task in TASKS}

    def loop(model: nn.Module, backward: Backward) -> None:
        for number, x in enumerate(batches(4)):
            if number == 2:
                torch.manual_seed(5)
                model.late = nn.Linear(8, 8).double()
            model.zero_grad()
            backward(losses(model, x))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0 if p.grad is None else 0.1 * p.grad

    plain, model = net(), net()
    loop(plain, lambda losses: sum(losses.values()).backward())
    loop(model, recon.Profiler(model).backward)
    assert_states_close(model, plain, 1e-11)
