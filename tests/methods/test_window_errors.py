"""What goes wrong in the middle of a step task by task: nothing is counted, summed or lost in silence."""

import pytest
import torch
from torch import nn

import recon
from recon.errors import UsageError
from tests.methods.test_window import gradients, loss_of, new_model, samples


class Large(nn.Module):
    """With parameters whose gradients are handed over while the backward pass still runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 200)
        self.second = nn.Linear(200, 200)
        self.heads = nn.ModuleDict({task: nn.Linear(200, 1) for task in "ab"})

    def loss(self, task):
        return self.heads[task](torch.tanh(self.second(torch.tanh(self.first(torch.ones(2, 4)))))).square().mean()


def fail(gradient):
    raise ValueError("a hook of the user's")


@pytest.mark.parametrize("memory", [None, "sketch"])
def test_a_backward_pass_that_fails_half_way_is_in_no_sum(memory):
    model = Large()
    window = recon.Window(model, profiler=memory and recon.Profiler(model, memory=memory))
    window.add("a", model.loss("a"))
    hook = model.first.weight.register_hook(fail)  # `second` has its gradient by then
    with pytest.raises(ValueError, match="a hook"):
        window.add("b", model.loss("b"))
    hook.remove()
    for call in (window.step, lambda: window.add("b", model.loss("b"))):
        with pytest.raises(UsageError, match=r"task 'b' failed half-way.*window\.discard\(\)"):
            call()
    window.discard()
    for task in "ab":
        window.add(task, model.loss(task))
    window.step()
    expected = Large()
    recon.backward({task: expected.loss(task) for task in "ab"}, expected)
    for p, q in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(p, q)


def test_a_backward_pass_that_fails_leaves_held_gradients_as_they_were():
    model = Large()
    window = recon.Window(model, "pcgrad")
    window.add("a", model.loss("a"))
    hook = model.first.weight.register_hook(fail)
    with pytest.raises(ValueError, match="a hook"):
        window.add("b", model.loss("b"))
    hook.remove()
    window.add("b", model.loss("b"))
    window.step()
    expected = Large()
    recon.backward({task: expected.loss(task) for task in "ab"}, expected, "pcgrad")
    for p, q in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("method", [None, "pcgrad"])
def test_losses_of_one_forward_belong_to_backward(method):
    model = new_model()
    outputs = model(samples(0))
    window = recon.Window(model, method)
    window.add("a", outputs["a"].square().mean())
    with pytest.raises(UsageError, match=r"task 'b' .* freed .*recon\.backward"):
        window.add("b", outputs["b"].square().mean())


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_a_discarded_step_was_none(memory):
    model = new_model()
    profiler = recon.Profiler(model, memory=memory, every=2)
    window = recon.Window(model, profiler=profiler)
    for step in range(4):  # of which two are discarded, one is recorded, and one is not
        window.add("a", loss_of(model, samples(step), "a"))
        if step % 2:
            window.discard()
        else:
            window.add("b", loss_of(model, samples(step), "b"))
            window.step()
    assert profiler.steps == 1


@pytest.mark.parametrize("memory", ["exact", "sketch"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_floor_is_of_the_step_around_it(memory, when):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    profiler = recon.Profiler(model, memory=memory)
    window = recon.Window(model, profiler=profiler)
    for step in range(3):

        def floor(now, step=step):
            if now == when:
                profiler.floor({task: loss_of(model, samples(10 + step), task) for task in "ab"})

        floor("before")
        window.add("a", loss_of(model, samples(step), "a"))
        floor("between")
        window.add("b", loss_of(model, samples(step), "b"))
        window.step()
        floor("after")
        optimizer.step()
        optimizer.zero_grad()
    cmap = profiler.conflict_map()
    assert cmap.has_floor
    assert all(layer.floor.observed.tolist() == [3, 3] for layer in cmap.layers)


@pytest.mark.parametrize("method", ["cagrad", "config"])
def test_steps_of_other_tasks_and_other_users_of_the_memory(method):
    """Gradients are held where the last step had them, which need not be where this one wants them."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.table = nn.Embedding(9, 3, sparse=True)
            self.early, self.late = nn.Linear(3, 5), nn.Linear(5, 5)
            self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in "abc"})

        def loss(self, task, x):
            z = torch.tanh(self.early(self.table(x)))
            z = z if task == "c" else torch.tanh(self.late(z))
            return (self.heads[task](z) - ord(task) + 98).square().mean()

    one, other = Three().double(), Three().double()
    methods = [recon.methods.get(method) for _ in range(2)]
    for each in methods:
        each.setup(("a", "b", "c"))
    window = recon.Window(other, methods[1])
    orders = ["abc", "abc", "cb", "ab", "bac", "a", "cab", "cab", "abc"]
    for step, order in enumerate(orders):
        torch.manual_seed(step)
        xs = {task: torch.randint(9, (4,)) for task in "abc"}
        torch.manual_seed(step)
        recon.backward({task: one.loss(task, xs[task]) for task in sorted(order)}, one, methods[0])
        for place, task in enumerate(order):
            window.add(task, other.loss(task, xs[task]))
            if step % 2 and place == 0:  # somebody else's step, of the same method
                recon.backward({t: other.loss(t, xs[t].flip(0) // 2) for t in "abc"}, other, methods[1])
                other.zero_grad()
                window.add(task, other.loss(task, xs[task]) * 0.5)
                window.add(task, other.loss(task, xs[task]) * -0.5)
        torch.manual_seed(step)
        window.step()
        for p, q in zip(gradients(one), gradients(other), strict=True):
            if p is None or q is None:
                assert p is None or not p.any()
                assert q is None or not q.any()
            else:
                assert p.is_sparse == q.is_sparse
                torch.testing.assert_close(q.to_dense(), p.to_dense(), rtol=1e-9, atol=1e-12)
        one.zero_grad()
        other.zero_grad()
