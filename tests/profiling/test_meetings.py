"""A profile in a loop of one's own whose tasks never meet says so, and what to do."""

import pytest
import torch

import recon
from recon.errors import UsageError
from tests.methods.test_jacobian import TwoHeads

WAYS = [r"recon\.joint_loader", r"recon\.Window", "accumulate='tasks'"]


def profiled(steps, **options):
    torch.manual_seed(0)
    model = TwoHeads()
    profiler = recon.Profiler(model, until_stable=0.5, **options)
    for step in range(steps):
        task = "ab"[step % 3 == 0]
        profiler.backward({task: model(torch.randn(4, 1, 6, 6))[task].square().mean()})
    return model, profiler


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_the_map_of_tasks_that_never_met_says_so(memory):
    _, profiler = profiled(6, memory=memory)
    with pytest.raises(UsageError, match=r"No two tasks have met in the first 6 steps \(a in 4, b in 2\)") as error:
        profiler.conflict_map()
    for way in WAYS:
        error.match(way)


def test_a_ranking_that_cannot_settle_says_so():
    _, profiler = profiled(19)
    assert not profiler.is_stable()
    for steps in (20, 50):
        _, profiler = profiled(steps)
        with pytest.raises(UsageError, match=rf"have met in the first {steps} steps .*Window"):
            profiler.is_stable()


def test_an_interrupted_profile_remembers_who_met():
    model, before = profiled(20)
    after = recon.Profiler(model, until_stable=0.5)
    after.load_state_dict(before.state_dict())
    with pytest.raises(UsageError, match=r"\(a in 13, b in 7\)"):
        after.is_stable()
    outputs = model(torch.randn(4, 1, 6, 6))
    after.backward({task: outputs[task].square().mean() for task in "ab"})
    assert not after.is_stable()
    assert after.conflict_map().tasks == ("b", "a")
