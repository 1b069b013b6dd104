"""Modules that are swapped, or changed, in a branched model: each task sees its plain model, changed alike."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.modules.hooks import SplitOutputs, TasksOnly
from recon.branching.plan import BranchPlan
from recon.errors import FanError, ReconError, UsageError
from tests import oracle
from tests.zoo import TASKS

both_modes = pytest.mark.parametrize("mode", ["fan", "per-task"])


class Net(nn.Module):
    """Heads that serve one task each, and a part that serves two: hooks keep the others' values from them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        h = self.second(self.norm(self.first(x)).tanh()).tanh()
        return {task: head(h if task == "a" else self.two(h)) for task, head in self.heads.items()}


def branch(layers=("first",), mode="fan", dtype=torch.float64):
    torch.manual_seed(0)
    branched = convert(Net().to(dtype), BranchPlan.per_task(layers, TASKS), batch(dtype), mode=mode)
    oracle.perturb(branched)
    branched(batch(dtype))
    return branched


def batch(dtype=torch.float64, size=5):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_the_hooks_take_keyword_arguments_or_not():
    calls = {
        "plain": (TasksOnly(("a",))(nn.Linear(1, 1), (1, 2)),),
        "keyword": TasksOnly(("a",))(None, (1, 2), {"k": 3}),
    }
    assert calls == {"plain": ((1, 2),), "keyword": ((1, 2), {"k": 3})}
    output = {"a": torch.ones(1), "b": torch.zeros(1)}
    assert (
        SplitOutputs(("a",))(None, (), output) == SplitOutputs(("a",))(None, (), {"k": 3}, output) == {"a": output["a"]}
    )


@pytest.mark.filterwarnings("ignore")
@both_modes
@pytest.mark.parametrize("layers", [("first",), ("second", "norm"), ("heads.a",)], ids="+".join)
def test_quantize_dynamic(layers, mode):
    """It swaps every linear layer by its exact class, and puts the hooks on the new one without a word of keywords."""
    branched = branch(layers, mode, torch.float32).eval()
    plains = {task: extract_task(branched, task) for task in TASKS}

    def quantize(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    quantized, inputs = quantize(branched), batch(torch.float32)
    assert not any(type(part) is nn.Linear for part in quantized.modules())
    outputs = quantized(inputs)
    for task, plain in plains.items():
        assert torch.equal(outputs[task], quantize(plain)(inputs)[task])


class Adapter(nn.Module):
    """LoRA around a layer, as peft puts it in the layer's place."""

    def __init__(self, base) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=draw, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=draw, dtype=torch.float64))

    def forward(self, input):
        return self.base(input) + input @ self.down.t() @ self.up.t()


def adapt(model):
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Adapter(module))


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def of_class(cls, change):
    def apply(model):
        for module in list(model.modules()):
            if isinstance(module, cls):
                torch.manual_seed(3)
                change(module)

    return apply


SWAPS = {
    "adapters": adapt,
    "pruned layers": of_class(nn.Linear, lambda part: prune.l1_unstructured(part, "weight", amount=0.5)),
    "pruned norms": of_class(nn.BatchNorm1d, lambda part: prune.l1_unstructured(part, "weight", amount=0.5)),
    "weight norm": of_class(nn.Linear, parametrizations.weight_norm),
    "weight norm by a hook": of_class(nn.Linear, nn.utils.weight_norm),
    "spectral norm": of_class(nn.Linear, parametrizations.spectral_norm),
    "spectral norm by a hook": of_class(nn.Linear, nn.utils.spectral_norm),
    "parametrized layers": of_class(
        nn.Linear, lambda part: parametrize.register_parametrization(part, "weight", Tanh())
    ),
    "parametrized norms": of_class(
        nn.BatchNorm1d, lambda part: parametrize.register_parametrization(part, "weight", Tanh())
    ),
}


@both_modes
@pytest.mark.parametrize("layers", [("first",), ("second", "norm"), ("heads.a",)], ids="+".join)
@pytest.mark.parametrize("swap", SWAPS)
def test_what_is_done_to_every_layer_of_a_class(swap, layers, mode):
    branched, inputs = branch(layers, mode), batch()
    plains = {task: extract_task(branched, task) for task in TASKS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        SWAPS[swap](branched)
        for plain in plains.values():
            SWAPS[swap](plain)
    for training in (True, False):
        outputs = branched.train(training)(inputs)
        for task, plain in plains.items():
            expected = plain.train(training)(inputs)[task]
            oracle.assert_close(outputs[task], expected, f"{task}, training: {training}")
    for task, plain in plains.items():
        found, expected = extract_task(branched, task).state_dict(), plain.state_dict()
        assert list(found) == list(expected)
        for key, value in expected.items():
            if not key.startswith("heads.") or key.startswith(f"heads.{task}"):
                oracle.assert_close(found[key], value, key)


# What is done to a branched layer itself.


@both_modes
def test_what_is_assigned_to_a_branched_layer_is_assigned_to_its_copies(mode):
    branched, inputs = branch(("first", "second"), mode), batch()
    plains = {task: extract_task(branched, task) for task in TASKS}
    bias = nn.Parameter(torch.ones(4).double())
    for model in (branched, *plains.values()):
        model.first.bias = bias
        model.second.weight = nn.Parameter(model.second.weight * 2)  # reads as a fan
    outputs = branched(inputs)
    for task, plain in plains.items():
        oracle.assert_close(outputs[task], plain(inputs)[task], task)
    keys = dict(branched.named_parameters(remove_duplicate=False))
    assert all(keys[f"first.branches.{task}.bias"] is bias for task in TASKS)
    assert "second.branches.b.weight" in keys and "second.weight" not in keys


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda layer: layer.register_buffer("scale", torch.ones(1)),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "register_parameter", "register_buffer"],
)
def test_what_a_branched_layer_refuses(change):
    branched = branch()
    with pytest.raises(UsageError, match=r"at 'first', which is branched: .* for copy in layer.branches.children\(\)"):
        change(branched.first)
    for part in branched.first.branches.children():
        change(part)


def test_what_one_copy_cannot_take():
    branched = convert(
        Net().double(), BranchPlan.grouped({"first": ["a", "b", "c"], "second": [["a", "b"], "c"]}, TASKS), batch()
    )
    finer = torch.stack([branched.first.bias] * 4)
    with pytest.raises(FanError, match=r"differs between the tasks \['a', 'b'\] is assigned to 'weight'"):
        branched.second.weight = nn.Parameter(finer)
    with pytest.raises(ReconError, match="all copies would share one module assigned to its 'out_proj'"):
        net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "heads": nn.Linear(4, 4)})
        _with_attention(net).attention.out_proj = nn.Linear(4, 4)


def _with_attention(parts):
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.heads = parts["attention"], parts["heads"]

        def forward(self, x):
            return dict.fromkeys(TASKS, self.heads(self.attention(x, x, x)[0]))

    return convert(Attentive(), BranchPlan.per_task(["attention"], TASKS), torch.randn(3, 2, 4))
