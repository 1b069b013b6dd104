"""Parts of a model that torch.compile has compiled, on values that differ between tasks."""

import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.plan import BranchPlan
from recon.errors import FanError
from tests import oracle

TASKS = ("a", "b", "c")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mixed(net, x):
    y = x * net.weight
    return y * y.exp() + y.detach()


def in_place(net, x):
    y = x * 1
    y.mul_(2)
    y += x
    return y * net.weight


def structures(net, x, *, scale=2.0):
    parts = {"y": [x * net.weight, x.cos() * scale], "n": (x.shape[0], None)}
    low, high = (parts["y"][0] * parts["y"][1]).chunk(2, 1)
    return torch.cat([high, low], 1)


def normalised(net, x):
    return net.norm(net.linear(x))


class Body(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = [function]
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.function[0](self, x)


class Net(nn.Module):
    def __init__(self, function, compiled="nothing", backend="aot_eager"):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, 4), Body(function), nn.Linear(4, 4)
        match compiled:
            case "function":
                self.body.function = [torch.compile(function, backend=backend)]
            case "module":
                self.body = torch.compile(self.body, backend=backend)
            case "layers":
                self.body.linear = torch.compile(self.body.linear, backend=backend)
                self.body.norm = torch.compile(self.body.norm, backend=backend)

    def forward(self, x):
        return dict.fromkeys(TASKS, self.last(self.body(self.first(x))))


def branch(model, layer="first", mode="fan"):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    branched = convert(model.double(), BranchPlan.grouped({layer: [["a", "b"], "c"]}, TASKS), x, mode=mode)
    oracle.perturb(branched)
    return branched, x


def agrees(function, compiled, branched, x):
    """As the oracle computes it, in which nothing is compiled but the names that compiling gives."""
    for training, gradients in ((True, True), (False, True), (False, False)):
        oracle.check(
            lambda: Net(function, compiled, "eager").double(), branched.train(training), x, gradients=gradients
        )


@pytest.mark.parametrize("mode", ["fan", "per-task"])
@pytest.mark.parametrize(
    ("function", "compiled", "layer"),
    [
        (mixed, "function", "first"),
        (in_place, "function", "first"),
        (structures, "function", "first"),
        (mixed, "module", "first"),
        (in_place, "module", "body._orig_mod.weight"),
        (normalised, "module", "body._orig_mod.norm"),
        (normalised, "layers", "first"),
        (normalised, "layers", "body.linear._orig_mod"),
    ],
)
def test_parts_compiled_before_the_surgery(function, compiled, layer, mode):
    branched, x = branch(Net(function, compiled), layer, mode)
    agrees(function, "nothing" if compiled == "function" else compiled, branched, x)
    branched.eval()
    outputs = branched(x)
    for task in TASKS:
        oracle.assert_close(extract_task(branched, task)(x)[task], outputs[task], task)


@pytest.mark.parametrize("mode", ["fan", "per-task"])
@pytest.mark.parametrize(("function", "layer"), [(mixed, "body.weight"), (normalised, "body.linear")])
def test_parts_compiled_in_place_after_the_surgery(function, layer, mode):
    branched, x = branch(Net(function), layer, mode)
    branched.body.compile(backend="aot_eager")
    agrees(function, "nothing", branched, x)


@pytest.mark.parametrize("function", [mixed, in_place])
def test_a_branched_model_compiled_as_a_whole(function):
    branched, x = branch(Net(function))
    twin = copy.deepcopy(branched)
    compiled = torch.compile(branched, backend="aot_eager")
    for training in (True, False, True):
        compiled.train(training)
        twin.train(training)
        outputs, expected = compiled(x), twin(x)
        for task in TASKS:
            oracle.assert_close(outputs[task], expected[task], task)
        for found in (outputs, expected):
            sum(oracle.loss_of(found[task], task) for task in TASKS).backward()
    for (name, parameter), other in zip(branched.named_parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            oracle.assert_close(parameter.grad, other.grad, name)


def test_a_graph_that_takes_no_break_is_refused_behind_the_branch_point_alone():
    def whole(net, x):
        return normalised(net, x)

    full = torch.compile(whole, backend="aot_eager", fullgraph=True)
    if not hasattr(torch._dynamo.eval_frame, "set_fullgraph_compiled_frame_count"):
        pytest.skip("this version of torch does not show the option")
    with pytest.raises(
        FanError, match=r"fullgraph=True at test_compiled_parts.py:\d+, in \w+: .*recon.lower.*mode='per-task'"
    ):
        branch(Net(full))
    for layer, mode in (("last", "fan"), ("first", "per-task")):
        torch.compiler.reset()
        branched, x = branch(Net(full), layer, mode)
        oracle.check(lambda: Net(normalised).double(), branched.eval(), x)


def test_the_compiler_is_imported_by_whoever_compiles_and_told_then():
    program = """
import importlib.util, sys
import recon.branching.conversion, recon.branching.fans.value
assert "torch._dynamo" not in sys.modules
importlib.util.find_spec("torch._dynamo")  # asks for it, and no more
from torch._dynamo import trace_rules
from recon.branching.fans.compilers import _OURS
assert all(importlib.util.find_spec(name) for name in _OURS.split())
assert trace_rules.check_file(recon.branching.fans.value.__file__).skipped
assert not trace_rules.check_file(recon.__file__).skipped
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
