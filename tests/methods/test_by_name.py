"""Methods that `recon.backward` is given by their names."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import recon
from recon import methods
from recon.errors import UnknownNameError, UsageError
from recon.methods.by_name import _made, method_by_name
from tests.methods.test_jacobian import losses_of
from tests.methods.test_methods import scratch_registry
from tests.methods.test_step import model, x

fixtures = (model, x, scratch_registry)
MEMORYLESS = [name for name in methods.names() if methods.get(name).memoryless]


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_which_methods_remember_something():
    remembering = {name for name in methods.names() if name not in MEMORYLESS}
    assert remembering == {
        *("uw", "imtl-l", "dwa", "gradnorm", "famo", "gradvac", "sdmgrad", "modo", "excessmtl", "rotograd")
    }


@pytest.mark.parametrize("name", MEMORYLESS)
def test_a_memoryless_method_owes_nothing_to_earlier_steps(name, model, x):
    """After some steps, it does what a new one does that stands at the same place of its random stream."""
    used, fresh = methods.get(name), methods.get(name)
    for scale in (3.0, 0.1):
        recon.backward({task: scale * loss for task, loss in losses_of(model, x).items()}, model, used)
    fresh.setup(used.tasks)
    fresh.load_state_dict(used.state_dict())
    for key, value in fresh.state_dict().items():  # all but the stream, as it was at the beginning
        if torch.is_tensor(value) and "stream" not in key:
            value.fill_(1.0)
    assert not list(used.parameters()) and not used.needs_new_losses
    results = []
    for method in (used, fresh):
        model.zero_grad()
        recon.backward(losses_of(model, x), model, method)
        results.append(gradients(model))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("text", ["joint", "joint:weights=a:0.5/b:2", "cagrad:c=0.3", "pcgrad", "rlw", "stch+mgda"])
def test_a_name_does_what_one_method_for_the_loop_does(text, model, x):
    by_name = copy.deepcopy(model)
    method = methods.parse(text)
    for _ in range(3):  # of a random stream, every step has its own part
        weights = recon.backward(losses_of(model, x), model, method)
        assert recon.backward(losses_of(by_name, x), by_name, text) == weights
    for p, q in zip(model.parameters(), by_name.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_it_is_made_once_for_each_model(model, x):
    other = copy.deepcopy(model)
    tasks = ("a", "b")
    method = method_by_name("pcgrad", model, tasks)
    assert method_by_name("pcgrad", model, tasks) is method
    assert method_by_name("pcgrad", model, ("b",)) is method
    assert method_by_name("pcgrad:seed=1", model, tasks) is not method
    assert method_by_name("pcgrad", other, tasks) is not method
    gone = weakref.ref(method_by_name("pcgrad", other, tasks))
    del other
    gc.collect()
    assert gone() is None


def test_a_model_in_parts_keeps_its_method(model, x):
    parts = [model.conv, model.norm, model.extra, *model.heads.values()]
    for _ in range(2):
        recon.backward(losses_of(model, x), parts, "pcgrad")
    assert len(_made[model.conv]) == 1


def test_a_task_that_the_first_step_lacked(model, x):
    losses = losses_of(model, x)
    recon.backward({"b": losses["b"]}, model, "stch")
    model.zero_grad()
    weights = recon.backward(losses_of(model, x), model, "stch")
    assert weights == recon.backward(losses_of(model, x), model, methods.get("stch"))
    assert method_by_name("stch", model, ("a",)).tasks == ("b", "a")


@pytest.mark.parametrize("text", ["uw", "gradnorm", "gradvac", "uw+pcgrad", "dwa:temperature=1", "rotograd"])
def test_a_method_that_remembers_is_refused_by_name(text, model, x):
    make = "parse" if ":" in text else "get"
    with pytest.raises(UsageError, match=rf"Make it once, before the loop.* recon\.methods\.{make}\('"):
        recon.backward(losses_of(model, x), model, text)
    assert all(p.grad is None for p in model.parameters())


def test_no_such_method(model, x):
    with pytest.raises(UnknownNameError, match="cagrad"):
        recon.backward(losses_of(model, x), model, "cagrd")
    with pytest.raises(UsageError, match="no option"):
        recon.backward(losses_of(model, x), model, "cagrad:d=1")


def test_a_definition_that_is_executed_again_counts(model, x, scratch_registry):
    def define(factor):
        @methods.register("halves")
        def halves(losses):
            """Every loss times a number."""
            return 0 * losses + factor

    for factor in (0.5, 0.25):
        define(factor)
        assert recon.backward(losses_of(model, x), model, "halves")["a"] == factor


def test_a_class_of_one_s_own_says_that_it_keeps_nothing(model, x, scratch_registry):
    @methods.register("first")
    class First(methods.GramianAggregator):
        """The first task alone."""

        def weights(self, gramian, tasks=None):
            return torch.eye(len(gramian)).to(gramian)[0]

    with pytest.raises(UsageError, match="memoryless = True"):
        recon.backward(losses_of(model, x), model, "first")
    First.memoryless = True
    assert recon.backward(losses_of(model, x), model, "first")["a"] == 1
