import pytest
import torch
import torchvision
from torch import nn

from recon.branching.conversion import convert
from recon.branching.plan import BranchPlan
from recon.errors import UsageError
from recon.plans.costing.costs import costs
from recon.support.network.layers import find_layers
from tests import oracle
from tests.zoo import ZOO

TASKS = ("a", "b", "c")


class Chain(nn.Module):
    """Three convolutions and a linear layer per task."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 3))
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})

    def forward(self, x):
        x = self.convs(x).mean((2, 3))
        return {task: head(x) for task, head in self.heads.items()}


# For a 10 x 8 image: output pixels x weights.
FIRST, SECOND, THIRD, HEAD = 80 * 4 * 3 * 9, 80 * 5 * 4, 48 * 6 * 5 * 9, 6 * 2
WEIGHTS = {
    "convs.0": 4 * 27 + 4,
    "convs.2": 5 * 4 + 5,
    "convs.3": 6 * 45 + 6,
    "heads": 3 * 14,
}
BATCH = 2


def cost_of(plan):
    model, inputs = Chain(), torch.randn(BATCH, 3, 10, 8)
    return costs(model, plan, inputs)


def test_of_a_plain_model():
    cost = cost_of(None)
    assert cost.parameters == sum(WEIGHTS.values())
    assert cost.macs == BATCH * (FIRST + SECOND + THIRD + 3 * HEAD)


@pytest.mark.parametrize(
    ("groups", "macs", "copies"),
    [
        ({"convs.0": TASKS}, 3 * (FIRST + SECOND + THIRD), {"convs.0": 2}),
        ({"convs.2": TASKS}, FIRST + 3 * (SECOND + THIRD), {"convs.2": 2}),
        ({"convs.3": [["a", "b"], "c"]}, FIRST + SECOND + 2 * THIRD, {"convs.3": 1}),
        (
            {"convs.2": [["a", "b"], "c"], "convs.3": ["a", ["b", "c"]]},
            FIRST + 2 * SECOND + 3 * THIRD,
            {"convs.2": 1, "convs.3": 1},
        ),
    ],
)
def test_of_a_branched_model(groups, macs, copies):
    cost = cost_of(BranchPlan.grouped(groups, TASKS))
    assert cost.parameters == sum(size * (1 + copies.get(name, 0)) for name, size in WEIGHTS.items())
    assert cost.macs == BATCH * (macs + 3 * HEAD)  # each task's head runs for that task alone


def test_of_a_model_that_is_branched_already():
    model, inputs = Chain(), torch.randn(BATCH, 3, 10, 8)
    plan = BranchPlan.per_task(["convs.2"], TASKS)
    branched = convert(model, plan, inputs)
    before = oracle.snapshot(branched)
    assert costs(branched, None, inputs) == costs(model, plan, inputs)
    oracle.assert_untouched(branched, before)


def test_branching_the_stems_norm_of_a_resnet_doubles_its_cost():
    class TwoDigits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torchvision.models.resnet18(num_classes=10)
            self.body.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
            self.body.fc = nn.Identity()
            self.heads = nn.ModuleDict({task: nn.Linear(512, 10) for task in ("a", "b")})

        def forward(self, x):
            x = self.body(x)
            return {task: head(x) for task, head in self.heads.items()}

    model, inputs = TwoDigits(), torch.randn(1, 1, 36, 36)
    plain = costs(model, None, inputs)
    branched = costs(model, BranchPlan.per_task(["body.bn1"], ("a", "b")), inputs)
    assert round(branched.macs / plain.macs, 2) == 1.99
    assert branched.parameters - plain.parameters == 128
    everything = costs(model, BranchPlan.per_task([layer.name for layer in find_layers(model)], ("a", "b")), inputs)
    assert everything.macs == 2 * plain.macs - 2 * 512 * 10  # a head runs for its own task alone


N, T, D, H = 2, 5, 8, 16
ATTENTION = N * (4 * T * D * D + 2 * T * T * D)


class Takes(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        attention = isinstance(self.layer, nn.MultiheadAttention)
        x = self.layer(x, x, x, need_weights=False) if attention else self.layer(x)
        x = x[0] if isinstance(x, tuple) else x
        return dict.fromkeys(TASKS, x)


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.LSTM(D, H, batch_first=True), N * T * 4 * H * (D + H)),
        (nn.GRU(D, H, batch_first=True), N * T * 3 * H * (D + H)),
        (nn.MultiheadAttention(D, 2, batch_first=True), ATTENTION),
        (nn.TransformerEncoderLayer(D, 2, H, batch_first=True), ATTENTION + N * T * 2 * D * H),
    ],
    ids=lambda part: type(part).__name__,
)
def test_fused_kernels_are_not_counted_as_nothing(layer, macs):
    enabled = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    inputs = torch.randn(N, T, D)
    assert costs(Takes(layer), None, inputs).macs == macs
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == enabled


def test_the_branched_parts_of_a_transformer_count_for_every_group():
    entry = ZOO["TransformerEncoder"]
    model, inputs = entry.make(), entry.inputs(2)
    plain = costs(model, None, inputs).macs
    first = costs(model, BranchPlan.per_task(["first"], TASKS), inputs).macs
    heads = 3 * 2 * 4 * 2
    assert first == 3 * (plain - heads) + heads


def test_it_leaves_the_model_as_it_is():
    entry = ZOO["Norms"]
    model, inputs = entry.make(), entry.inputs(2)
    before = oracle.snapshot(model)
    costs(model, None, inputs)
    costs(model, BranchPlan.per_task(["first"], TASKS), inputs)
    oracle.assert_untouched(model, before)


def test_the_plan_may_be_left_out_or_named():
    model, x = ZOO["PlainConv"].make(), ZOO["PlainConv"].inputs(2)
    plan = BranchPlan.per_task([find_layers(model)[0].name], ("a", "b"))
    assert costs(model, example_inputs=x) == costs(model, None, x)
    assert costs(model, plan, x) == costs(model, example_inputs=x, plan=plan) != costs(model, None, x)
    for arguments in ((), (x,), (plan,), (x, plan)):
        with pytest.raises(UsageError, match=r"needs a BranchPlan or None, and example inputs, .* Write recon\.costs"):
            costs(model, *arguments)
