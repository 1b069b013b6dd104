import copy
import logging
import random

import pytest
import torch
from torch import nn

from recon.branching.conversion import convert
from recon.branching.fans.fan import merge
from recon.branching.modules.branched import Branched
from recon.branching.modules.statistics import BranchedStatistics
from recon.branching.plan import BranchPlan
from recon.branching.verification import verify
from recon.errors import PlanError, UsageError, VerificationError
from tests import oracle
from tests.branching.test_conversion import seed_of
from tests.zoo import TASKS, ZOO, PlainConv, image, vector

BOTH = ("evaluation", "training")


@pytest.mark.parametrize("mode", ["fan", "per-task"])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, mode):
    entry = ZOO[name]
    torch.manual_seed(seed_of(name))
    model, inputs = entry.make(), entry.inputs(4)
    branched = convert(model, oracle.random_plan(model, "all", seed_of(name)), inputs, mode=mode)
    before = oracle.snapshot(model), oracle.snapshot(branched)
    found = verify(model, branched, inputs)
    oracle.assert_untouched(model, before[0])
    oracle.assert_untouched(branched, before[1])
    assert found.modes == BOTH and found.tolerance == 1e-9
    assert max(found.outputs, found.gradients, found.statistics) <= 1e-12


def first_copy_for_all(layer, *args, **kwargs):
    return layer.branch(layer.partition.groups[0])(*args, **kwargs)


def no_gradient(layer, *args, **kwargs):
    values = [layer.branch(group)(*args, **kwargs) for group in layer.partition.groups]
    return merge(layer.partition, [values[0], *(value.detach() for value in values[1:])])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (first_copy_for_all, r"in evaluation mode, for task 'c', the outputs at tensor 0 differ by \d"),
        (no_gradient, r"in evaluation mode, for task 'c', the gradients at body\.0\.0\.weight differ by \d"),
    ],
)
def test_a_branched_layer_at_fault(monkeypatch, fault, message):
    model = PlainConv().double()
    branched = convert(model, BranchPlan.grouped({"body.1.0": [["a", "b"], "c"]}, TASKS), image(4))
    monkeypatch.setattr(Branched, "forward", fault)
    with pytest.raises(VerificationError, match=message):
        verify(model, branched, image(4))


@pytest.mark.parametrize("kind", ["other rows", "dense", "more"])
def test_sparse_gradients_at_fault(monkeypatch, kind):
    entry = ZOO["SparseTables"]
    model, inputs = entry.make(), entry.inputs(4)
    branched = convert(model, BranchPlan.per_task(["words"], TASKS), inputs)

    def at_fault(layer, ids):
        values = [layer.branch(group)(ids) for group in layer.partition.groups]
        weight = layer.branch(layer.partition.groups[2]).weight
        first = torch.zeros(1, dtype=torch.long)
        extra = {
            "other rows": nn.functional.embedding(first, weight, sparse=True).sum(),
            "dense": weight.sum(),
            "more": values[2].sum(),
        }[kind]
        return merge(layer.partition, [*values[:2], values[2] + (extra - extra.detach())])

    monkeypatch.setattr(Branched, "forward", at_fault)
    with pytest.raises(VerificationError, match=r"for task 'c', the gradients at words\.weight differ by \d"):
        verify(model, branched, torch.randint(1, 7, (4, 5)))


def test_copies_that_get_another_tasks_gradient(monkeypatch):
    model = PlainConv().double()
    branched = convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(4))

    def all_copies_at_once(layer, x):
        values = [layer.branch(group)(x) for group in layer.partition.groups]
        leaks = [sum(other - other.detach() for other in values if other is not value) for value in values]
        return merge(layer.partition, [value + leak for value, leak in zip(values, leaks, strict=True)])

    monkeypatch.setattr(Branched, "forward", all_copies_at_once)
    with pytest.raises(VerificationError, match=r"for task 'a', the gradients at body\.0\.0\.branches\.b"):
        verify(model, branched, image(4))


def test_statistics_at_fault(monkeypatch):
    model = PlainConv().double()
    branched = convert(model, BranchPlan.per_task(["body.1.0"], TASKS), image(4))
    original = BranchedStatistics.forward

    def without_a_trace(layer, x):
        kept = [(part, {name: buffer.clone() for name, buffer in part._buffers.items()}) for part in layer.modules()]
        result = original(layer, x)
        for part, buffers in kept:
            part._buffers.update(buffers)
        return result

    monkeypatch.setattr(BranchedStatistics, "forward", without_a_trace)
    with pytest.raises(VerificationError, match=r"in training mode, for task 'a', the statistics at body\.1\.1\.run"):
        verify(model, branched, image(4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_other_precisions(dtype, tolerance):
    model = PlainConv().to(dtype)
    plan = BranchPlan.grouped({"body.1.0": [["a", "b"], "c"], "body.1.1": ["a", "b", "c"]}, TASKS)
    branched = convert(model, plan, image(4).to(dtype))
    found = verify(model, branched, image(4).to(dtype))
    assert found.tolerance == tolerance and found.modes == BOTH
    assert max(found.outputs, found.gradients, found.statistics) < tolerance


def test_dropout_is_verified_in_training_mode_too():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 50), nn.Dropout(0.5), ToTasks()).double()
    branched = convert(model, BranchPlan.per_task(["0"], TASKS), vector(4))
    found = verify(model, branched, vector(4))
    assert found.modes == BOTH and found.outputs == 0.0


class ToTasks(nn.Module):
    def forward(self, x):
        return dict.fromkeys(TASKS, x)


class LayerDrop(nn.Module):
    def __init__(self, always):
        super().__init__()
        self.always, self.layer, self.to_tasks = always, nn.Linear(6, 6), ToTasks()

    def forward(self, x):
        drop = (self.training or self.always) and random.random() < 0.5
        return self.to_tasks(x if drop else self.layer(x))


@pytest.mark.parametrize(("always", "modes"), [(False, ("evaluation",)), (True, ())])
def test_what_python_decides_at_random_is_not_compared(always, modes):
    model = LayerDrop(always).double()
    branched = convert(model, BranchPlan.per_task(["layer"], TASKS), vector(4))
    state = random.getstate()
    found = verify(model, branched, vector(4))
    assert found.modes == modes and random.getstate() == state
    assert str(found).startswith("Verified in evaluation mode against" if modes else "Not verified: Python's random")


def test_frozen_models_have_no_gradients_to_compare():
    model = PlainConv().double().requires_grad_(False)
    branched = convert(model, BranchPlan.per_task(["body.1.0"], TASKS), image(4))
    assert verify(model, branched, image(4)).modes == BOTH


def test_convert_verifies_on_demand(caplog, monkeypatch):
    model, plan = PlainConv().double(), BranchPlan.per_task(["body.1.0"], TASKS)
    with caplog.at_level(logging.INFO, "recon.branching.conversion"):
        branched = convert(model, plan, image(4), verify=True)
    assert "Verified in evaluation and training mode against the original" in caplog.text
    with pytest.raises(UsageError, match="convert needs example_inputs"):
        convert(model, branched.branch_plan, verify=True)
    monkeypatch.setattr(Branched, "forward", first_copy_for_all)
    with pytest.raises(VerificationError, match="mode='per-task'"):
        convert(model, plan, image(4), verify=True)


def test_a_plain_model():
    with pytest.raises(PlanError, match="not branched"):
        verify(PlainConv(), copy.deepcopy(PlainConv()), image(4))
