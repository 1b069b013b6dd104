"""A step task by task is the step of one forward: the same scores, the same update."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import recon
from recon.errors import GradientError, NonFiniteError, UnknownNameError, UsageError
from recon.methods.updates.one_task_steps import FIRST
from tests.methods.test_jacobian import TwoHeads
from tests.methods.test_step import FAMILY

NAMES = [name for name in recon.methods.names() if name != "rotograd"]
MIXED = ["uw+pcgrad", "joint:weights=0.3/1.7", "gradnorm+cagrad", "gradnorm:layer=conv"]
CASES = [
    (name, memory)
    for name in [*NAMES, *MIXED]
    for memory in (None, "exact", "sketch")
    # Sketches serve weightings alone.
    if memory != "sketch" or (FAMILY.get(name) != "aggregator" and "+" not in name)
]


def new_model():
    torch.manual_seed(0)
    return TwoHeads().double().eval()


def samples(step):
    torch.manual_seed(step)
    return torch.randn(8, 1, 6, 6, dtype=torch.float64)


def loss_of(model, x, task):
    return (model(x)[task] - (1.0 if task == "a" else -1.0)).square().mean()


def set_up(name, model):
    method = recon.methods.parse(name)
    method.setup(("a", "b"))
    method.attach(model)
    return method.double()


def at_once(model, x, method, profiler):
    return recon.backward({task: loss_of(model, x, task) for task in "ab"}, model, method, profiler=profiler)


def by_task(window, model, x):
    for task in "ab":
        window.add(task, loss_of(model, x, task))
    return window.step()


def profiler_of(model, memory):
    return None if memory is None else recon.Profiler(model, memory=memory)


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name, memory", CASES)
def test_task_by_task_is_all_at_once(name, memory):
    one, other = new_model(), new_model()
    methods = [set_up(name, one), set_up(name, other)]
    profilers = [profiler_of(one, memory), profiler_of(other, memory)]
    window = recon.Window(other, methods[1], profiler=profilers[1])
    for step in range(3):
        x = samples(step)
        torch.manual_seed(step)  # some methods draw
        weights = at_once(one, x, methods[0], profilers[0])
        torch.manual_seed(step)
        found = by_task(window, other, x)
        assert weights.keys() == found.keys()
        for task, weight in weights.items():
            torch.testing.assert_close(found[task], weight, rtol=1e-9, atol=1e-12)
        for p, q in zip(gradients(one), gradients(other), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)
        if methods[0].needs_new_losses:
            for model, method in zip((one, other), methods, strict=True):
                method.after_step({task: loss_of(model, x, task).detach() for task in "ab"})
    if memory is not None:
        maps = [profiler.conflict_map() for profiler in profilers]
        assert maps[0].scores() == maps[1].scores()
        for here, there in zip(maps[0].layers, maps[1].layers, strict=True):
            assert here.histogram.tolist() == there.histogram.tolist()


def test_a_methods_own_parameters_learn_alike():
    one, other = new_model(), new_model()
    methods = [set_up("uw", one), set_up("uw", other)]
    at_once(one, samples(0), methods[0], None)
    by_task(recon.Window(other, methods[1]), other, samples(0))
    for p, q in zip(methods[0].parameters(), methods[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_a_tasks_losses_add_up(method):
    one, other = new_model(), new_model()
    window = recon.Window(other, method)
    whole = {task: loss_of(one, samples(0), task) + loss_of(one, samples(1), task) for task in "ab"}
    recon.backward(whole, one, method)
    for seed in range(2):
        for task in "ab":
            window.add(task, loss_of(other, samples(seed), task))
    window.step()
    for p, q in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad"])
@pytest.mark.parametrize("scale", [64.0, 1 / 4])
def test_a_loss_scale_is_none_of_the_methods_business(method, scale):
    plain, scaled = new_model(), new_model()
    windows = [
        recon.Window(plain, set_up(method, plain)),
        recon.Window(scaled, set_up(method, scaled), loss_scale=scale),
    ]
    for task in "ab":
        windows[0].add(task, loss_of(plain, samples(0), task))
        windows[1].add(task, scale * loss_of(scaled, samples(0), task))
    for window in windows:
        window.step()
    for p, q in zip(gradients(plain), gradients(scaled), strict=True):
        torch.testing.assert_close(q / scale, p, rtol=1e-9, atol=1e-12)


def test_grad_accumulates_and_hooks_run_once_a_task():
    model = new_model()
    seen = []
    model.conv.weight.register_hook(lambda g: seen.append(g.clone()))
    before = torch.ones_like(model.conv.weight)
    model.conv.weight.grad = before.clone()
    window = recon.Window(model, "pcgrad")
    by_task(window, model, samples(0))
    expected = new_model()
    recon.backward({t: loss_of(expected, samples(0), t) for t in "ab"}, expected, "pcgrad")
    torch.testing.assert_close(model.conv.weight.grad - before, expected.conv.weight.grad)
    assert len(seen) == 2


class Kept(torch.autograd.Function):
    """Keeps something in the graph whose end can be watched."""

    @staticmethod
    def forward(ctx, x, probe):
        ctx.probe = probe
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Probe:
    pass


@pytest.mark.parametrize("memory", [None, "exact", "sketch"])
def test_a_graph_is_freed_before_the_next_task(memory):
    model = new_model()
    window = recon.Window(model, profiler=profiler_of(model, memory))
    for task in "ab":
        probe = Probe()
        ended = weakref.ref(probe)
        window.add(task, Kept.apply(loss_of(model, samples(0), task), probe))
        del probe
        gc.collect()
        assert ended() is None
    window.step()


@pytest.mark.parametrize("memory", [None, "sketch"])
def test_joint_training_holds_one_gradient(memory):
    model = new_model()
    window = recon.Window(model, profiler=profiler_of(model, memory))
    for task in "ab":
        window.add(task, loss_of(model, samples(0), task))
    assert not window._held
    assert set(window._sum.gradients) == set(model.parameters())


def test_a_lacking_task_can_still_be_added():
    model = new_model()
    window = recon.Window(model, "pcgrad", tasks=("a", "b"))
    window.add("a", loss_of(model, samples(0), "a"))
    with pytest.raises(UsageError, match=r"lacks the tasks b; added are a\. Call window\.add"):
        window.step()
    assert all(p.grad is None for p in model.parameters())
    window.add("b", loss_of(model, samples(0), "b"))
    expected = new_model()
    recon.backward({t: loss_of(expected, samples(0), t) for t in "ab"}, expected, "pcgrad")
    window.step()
    for p, q in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_step_of_nothing_is_refused():
    window = recon.Window(new_model())
    window.add("a", None)
    with pytest.raises(UsageError, match="Nothing was added"):
        window.step()


def test_what_was_discarded_counts_no_more():
    model = new_model()
    window = recon.Window(model)
    window.add("a", loss_of(model, samples(0), "a"))
    window.discard()
    assert window.added == ()
    by_task(window, model, samples(1))
    expected = new_model()
    at_once(expected, samples(1), None, None)
    for p, q in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_wrong_losses_leave_the_window_as_it_was():
    model = new_model()
    window = recon.Window(model, "pcgrad", tasks=("a", "b"))
    window.add("a", loss_of(model, samples(0), "a"))
    with pytest.raises(UsageError, match="scalar"):
        window.add("b", model(samples(0))["b"])
    with pytest.raises(GradientError, match="no trainable parameter"):
        window.add("b", torch.zeros((), requires_grad=True) * 2)
    with pytest.raises(UnknownNameError, match="'c'"):
        window.add("c", loss_of(model, samples(0), "a"))
    assert window.added == ("a",)


def test_a_gradient_that_is_not_finite_names_its_task():
    model = new_model()
    window = recon.Window(model, "pcgrad")
    window.add("a", loss_of(model, samples(0), "a"))
    window.add("b", loss_of(model, samples(0) * torch.nan, "b"))
    with pytest.raises(NonFiniteError, match="b"):
        window.step()


def test_tasks_are_names():
    assert recon.Window(new_model(), tasks=None).tasks == ()
    with pytest.raises(UsageError, match=r"tasks=\('seg', 'depth'\)"):
        recon.Window(new_model(), tasks="ab")


def test_rotograd_needs_the_same_samples():
    model = new_model()
    with pytest.raises(UsageError, match="same samples"):
        recon.Window(model, set_up("rotograd", model))


def test_sparse_tables_stay_sparse():
    class Tables(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(50, 4, sparse=sparse)
            self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in "ab"})

        def forward(self, x):
            return {task: head(self.table(x).mean(dim=1)) for task, head in self.heads.items()}

    models = [Tables(sparse).double() for sparse in (True, False)]
    for model in models:
        window = recon.Window(model, "pcgrad", profiler=recon.Profiler(model))
        torch.manual_seed(1)
        for task in "ab":
            window.add(task, (model(torch.randint(50, (8, 3)))[task] - ord(task)).square().mean())
        window.step()
    assert models[0].table.weight.grad.is_sparse
    torch.testing.assert_close(models[0].table.weight.grad.to_dense(), models[1].table.weight.grad)


def test_absent_losses_are_left_out():
    one, other = new_model(), new_model()
    recon.backward({"a": loss_of(one, samples(0), "a"), "b": None}, one)
    recon.backward({"a": loss_of(other, samples(0), "a")}, other)
    for p, q in zip(gradients(one), gradients(other), strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    with pytest.raises(UsageError, match="empty"):
        recon.backward({"a": None}, one)


def test_a_method_that_meets_one_task_at_a_time_says_so(caplog):
    model, method = new_model(), set_up("pcgrad", new_model())
    with caplog.at_level(logging.WARNING):
        for step in range(2 * FIRST):
            task = "ab"[step % 2]
            recon.backward({task: loss_of(model, samples(0), task)}, model, method)
    (message,) = [r.getMessage() for r in caplog.records if "acts between tasks" in r.getMessage()]
    for way in ("joint_loader", "Window", "accumulate='tasks'"):
        assert way in message


def test_a_single_task_baseline_is_not_warned_of(caplog):
    model, method = new_model(), recon.methods.get("pcgrad")
    for _ in range(2 * FIRST):
        recon.backward({"a": loss_of(model, samples(0), "a")}, model, method)
    assert not [r for r in caplog.records if "acts between tasks" in r.getMessage()]


def test_the_floor_of_losses_that_were_used_up_says_so():
    model = new_model()
    profiler = recon.Profiler(model)
    losses = {task: loss_of(model, samples(0), task) for task in "ab"}
    profiler.backward(losses)
    with pytest.raises(UsageError, match="second batch"):
        profiler.floor(losses)
