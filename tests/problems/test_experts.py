"""MMoE, PLE and the shared bottom, against the papers' equations and, branched, against the oracle."""

import pytest
import torch

import recon
from recon.models import PLE, MMoE, SharedBottom
from tests.oracle import KINDS, assert_no_crosstalk, check, perturb, random_plan

TASKS = {"a": 1, "b": 2, "c": 3}
MODELS = {
    "MMoE": lambda **options: MMoE(TASKS, 6, experts=3, expert=(5, 4), towers=(4,), **options).double(),
    "PLE": lambda **options: PLE(TASKS, 6, layers=2, shared_experts=2, task_experts=1, expert=(4,), **options).double(),
    "SharedBottom": lambda **options: SharedBottom(TASKS, 6, bottom=(5, 4), norm=True, **options).double(),
}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(7, 6, dtype=torch.float64)


def layers(state, prefix):
    """Weights and biases of the linear layers below a path, in order."""
    weights = [key for key in state if key.startswith(f"{prefix}.") and key.endswith("weight")]
    return [(state[key], state[key.removesuffix("weight") + "bias"]) for key in weights]


def experts(state, prefixes, x):
    """What experts with two hidden layers or one say, `(N, experts, width)`."""
    said = []
    for prefix in prefixes:
        h = x
        for weight, bias in layers(state, prefix):
            h = torch.einsum("ni,oi->no", h, weight).add(bias).clamp(min=0)
        said.append(h)
    return torch.stack(said, dim=1)


def gated(weight, x, said):
    scores = torch.einsum("ni,ei->ne", x, weight).exp()
    return torch.einsum("ne,new->nw", scores / scores.sum(dim=1, keepdim=True), said)


def through_tower(state, task, x):
    *hidden, (weight, bias) = layers(state, f"towers.{task}")
    for w, b in hidden:
        x = torch.einsum("ni,oi->no", x, w).add(b).clamp(min=0)
    return torch.einsum("ni,oi->no", x, weight) + bias


def test_mmoe_is_the_papers_sum_over_shared_experts(x):
    model = MODELS["MMoE"]()
    state = model.state_dict()
    said = experts(state, [f"experts.{i}" for i in range(3)], x)
    for task, output in model(x).items():
        mixed = gated(state[f"gates.{task}.linear.weight"], x, said)
        torch.testing.assert_close(output, through_tower(state, task, mixed))


def test_ple_mixes_own_and_shared_experts_layer_after_layer(x):
    model = PLE(TASKS, 6, layers=3, shared_experts=2, task_experts=3, expert=(5, 4)).double()
    state = model.state_dict()
    shared, own = x, dict.fromkeys(TASKS, x)
    for layer in (f"layers.{i}" for i in range(3)):
        of_all = experts(state, [f"{layer}.shared_experts.{i}" for i in range(2)], shared)
        of_task = {
            task: experts(state, [f"{layer}.task_experts.{task}.{i}" for i in range(3)], own[task]) for task in TASKS
        }
        mixed = {
            task: gated(
                state[f"{layer}.gates.{task}.linear.weight"], own[task], torch.cat([of_task[task], of_all], dim=1)
            )
            for task in TASKS
        }
        if layer != "layers.2":
            everyone = torch.cat([*of_task.values(), of_all], dim=1)
            shared = gated(state[f"{layer}.shared_gate.linear.weight"], shared, everyone)
        own = mixed
    assert not any(key.startswith("layers.2.shared_gate") for key in state)
    for task, output in model(x).items():
        torch.testing.assert_close(output, through_tower(state, task, own[task]))


def test_a_shared_bottom_is_one_trunk_under_all_towers(x):
    model = SharedBottom(TASKS, 6, bottom=(5, 4), towers=(3,)).double()
    state = model.state_dict()
    for task, output in model(x).items():
        torch.testing.assert_close(output, through_tower(state, task, experts(state, ["bottom"], x)[:, 0]))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_by_task(name, x):
    assert {task: tuple(output.shape) for task, output in MODELS[name]()(x).items()} == {
        task: (7, outputs) for task, outputs in TASKS.items()
    }


SHARED = {
    "MMoE": {f"experts.{i}.{j}" for i in range(3) for j in (0, 2)},
    # Those of a task in the first layer reach the others through the shared gate.
    "PLE": {
        *(f"layers.{i}.shared_experts.{j}.0" for i in (0, 1) for j in (0, 1)),
        *(f"layers.0.task_experts.{task}.0.0" for task in TASKS),
        "layers.0.shared_gate.linear",
    },
    "SharedBottom": {"bottom.0", "bottom.1", "bottom.3", "bottom.4"},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_tasks_share(name, x):
    batch = x, {task: torch.randn(7, outputs, dtype=torch.float64) for task, outputs in TASKS.items()}
    model = MODELS[name]()
    losses = dict.fromkeys(TASKS, torch.nn.functional.mse_loss)
    cmap = recon.profile(model, [batch], losses, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert {layer.name for layer in cmap.layers} == SHARED[name]


@pytest.mark.parametrize("name", MODELS)
def test_dropout_drops_in_training_only(name, x):
    model = MODELS[name](dropout=0.5)
    first, second = model(x)["b"], model(x)["b"]
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(x)["b"], model(x)["b"])


def test_dropout_of_the_inputs(x):
    model = SharedBottom(TASKS, 6, input_dropout=0.5).double()
    assert not torch.equal(model(x)["a"], model(x)["a"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_branched_they_compute_what_each_task_alone_would(name, kind, seed, x):
    model = MODELS[name]()
    branched = recon.convert(model, random_plan(model, kind, seed), x)
    perturb(branched)
    check(MODELS[name], branched, x)
    assert_no_crosstalk(branched, x)
    check(MODELS[name], branched.eval(), x)


@pytest.mark.parametrize("name", MODELS)
def test_verified_with_dropout(name, x):
    model = MODELS[name](dropout=0.3)
    plan = random_plan(model, "all", 0)
    assert recon.verify(model, recon.convert(model, plan, x), x).modes == ("evaluation", "training")
