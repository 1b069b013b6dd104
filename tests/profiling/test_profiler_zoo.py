"""The profiler over the zoo, against full backward passes of plain autograd, a fresh model for each task."""

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils._pytree import tree_map

import recon
from recon import methods
from recon.branching.plan import Mode
from recon.errors import UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import LayerConflicts
from recon.support.network.forward import call
from recon.support.network.layers import find_layers
from tests import oracle
from tests.zoo import TASKS, ZOO

# The others take the same ways.
AGGREGATORS = ["pcgrad", "graddrop", "excessmtl"]
WEIGHTINGS = ["joint", "uw", "dwa", "gradnorm"]

Gradients = dict[str, Tensor]
"""What one task's backward left in `.grad`, by parameter; what it did not reach is missing."""

every_model = pytest.mark.parametrize("name", ZOO)
both_modes = pytest.mark.parametrize("mode", ["fan", "per-task"])


# Models and their losses.


def fresh(name: str, dtype: torch.dtype = torch.float64, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name].make()
    oracle.perturb(model)
    return model.to(dtype).train(training)


def make_inputs(name: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    inputs = ZOO[name].inputs(6)
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def losses_of(model: nn.Module, inputs: Any, tasks: Sequence[str] = TASKS, seed: int = 2) -> dict[str, Tensor]:
    """The seed is for models that draw random numbers: every pass over the same batch drops the same units."""
    torch.manual_seed(seed)
    outputs = call(model, copy.deepcopy(inputs))
    return {task: oracle.loss_of(outputs[task], task) for task in tasks}


def with_state_of(model: nn.Module, name: str) -> nn.Module:
    """The same model made anew, with nothing of its history but parameters and buffers."""
    other = fresh(name, training=model.training)
    theirs = oracle.state_of(model)
    with torch.no_grad():
        for key, value in oracle.state_of(other).items():
            value.copy_(theirs[key])
    return other


# The oracle.


def gradients_of(model: nn.Module) -> Gradients:
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def task_gradients(model: nn.Module, name: str, inputs: Any, tasks: Sequence[str], **seed: int) -> dict[str, Gradients]:
    found = {}
    for task in tasks:
        other = with_state_of(model, name)
        losses_of(other, inputs, tasks, **seed)[task].backward()
        found[task] = gradients_of(other)
    return found


def cosines_of(model: nn.Module, gradients: Mapping[str, Gradients]) -> dict[str, dict[tuple[str, str], float]]:
    """`{layer: {pair: cosine}}`, of the pairs whose tasks both reach the layer."""
    keys = {p: key for key, p in model.named_parameters()}
    found = {}
    for layer in find_layers(model):
        vectors = {}
        for task, some in gradients.items():
            by_key = {key: g.to_dense() if g.is_sparse else g for key, g in some.items()}
            own = {keys[p]: p for p in layer.parameters.values()}
            if any(by_key[key].any() for key in own if key in by_key):
                parts = [by_key.get(key, torch.zeros_like(p)).flatten() for key, p in own.items()]
                vectors[task] = torch.cat(parts).double()
        found[layer.name] = {
            (first, second): float(vectors[first] @ vectors[second] / (vectors[first].norm() * vectors[second].norm()))
            for first, second in combinations(gradients, 2)
            if first in vectors and second in vectors
        }
    return found


def shared_layers(model: nn.Module, gradients: Mapping[str, Gradients]) -> list[str]:
    """The layers that two tasks reach, be it by different parameters or by a gradient of zero."""
    keys = {p: key for key, p in model.named_parameters()}
    found = []
    for layer in find_layers(model):
        own = {keys[p] for p in layer.parameters.values()}
        if sum(not own.isdisjoint(by_key) for by_key in gradients.values()) > 1:
            found.append(layer.name)
    return found


# What is compared.


def assert_map(
    cmap: ConflictMap, steps: Sequence[Mapping[str, Mapping[tuple[str, str], float]]], tolerance: float = 1e-9
) -> None:
    """The map holds these cosines, step by step, and no others."""
    assert (cmap.steps, cmap.skipped) == (len(steps), 0)
    names = {layer.name for layer in cmap.layers}
    assert {layer for step in steps for layer, cosines in step.items() if cosines} <= names
    for layer in cmap.layers:
        for number, pair in enumerate(cmap.pairs):
            cosines = [step[layer.name][pair] for step in steps if pair in step[layer.name]]
            assert layer.observed[:, number].sum() == len(cosines), (layer.name, pair)
            assert_between(layer.conflicts[:, number].sum(), cosines, cmap.threshold, f"{layer.name} {pair}", tolerance)
        assert_histogram(layer, [c for step in steps for c in step[layer.name].values()], tolerance)


def assert_same_pairs(cmap: ConflictMap, expected: ConflictMap) -> None:
    """The maps saw the same pairs in the same layers, whatever their cosines."""
    assert [layer.name for layer in cmap.layers] == [layer.name for layer in expected.layers]
    for ours, theirs in zip(cmap.layers, expected.layers, strict=True):
        assert ours.observed.tolist() == theirs.observed.tolist(), ours.name
        assert ours.histogram.sum() == theirs.observed.sum(), ours.name


def assert_histogram(layer: LayerConflicts, cosines: Sequence[float], tolerance: float) -> None:
    assert layer.histogram.sum() == len(cosines), layer.name
    for bin_ in range(1, 200):
        assert_between(layer.histogram[:bin_].sum(), cosines, (bin_ - 100) / 100, layer.name, tolerance)


def assert_between(count: int, cosines: Sequence[float], threshold: float, what: str, tolerance: float) -> None:
    """`count` is the number of cosines below the threshold; one that lies on it to rounding may fall either way."""
    least, most = (sum(c < threshold + side for c in cosines) for side in (-tolerance, tolerance))
    assert least <= count <= most, f"{what}: {count} below {threshold}, of {cosines}"


def assert_gradients_close(model: nn.Module, expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        oracle.assert_close(found[key], gradient, f"gradient of {key}", tolerance)


def assert_states_close(model: nn.Module, expected: nn.Module, tolerance: float) -> None:
    theirs = oracle.state_of(expected)
    for key, value in oracle.state_of(model).items():
        oracle.assert_close(value, theirs[key], key, tolerance)


def assert_same_bits(model: nn.Module, expected: nn.Module) -> None:
    theirs = oracle.state_of(expected)
    for key, value in oracle.state_of(model).items():
        assert torch.equal(value, theirs[key]), key


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# Plain models.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tasks", [TASKS, ("c", "a")], ids="".join)
@every_model
def test_one_step(name, tasks, training):
    inputs = make_inputs(name)
    model = fresh(name, training=training)
    gradients = task_gradients(model, name, inputs, tasks)
    expected = cosines_of(model, gradients)
    plain = with_state_of(model, name)
    sum(losses_of(plain, inputs, tasks).values()).backward()

    profiler = recon.Profiler(model)
    profiler.backward(losses_of(model, inputs, tasks))
    cmap = profiler.conflict_map()
    assert cmap.tasks == tasks
    assert [layer.name for layer in cmap.layers] == shared_layers(model, gradients)
    assert_map(cmap, [expected])
    assert_gradients_close(model, gradients_of(plain))


@every_model
def test_one_step_changes_nothing_but_the_gradients(name):
    inputs, plain, model = make_inputs(name), fresh(name), fresh(name)
    sum(losses_of(plain, inputs).values()).backward()
    random = torch.get_rng_state()
    profiler = recon.Profiler(model)
    profiler.backward(losses_of(model, inputs))
    profiler.conflict_map()
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_bits(model, plain)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert [module.training for module in model.modules()] == [module.training for module in plain.modules()]


@every_model
def test_joint_training(name):
    """The cosines of every step are those of a training without a profiler, and the model ends where it does."""
    plain, model = fresh(name), fresh(name)
    optimizers = sgd(plain), sgd(model)
    profiler = recon.Profiler(model, threshold=-0.02)
    steps = []
    for step in range(1, 6):
        inputs, seed = make_inputs(name, seed=step), {"seed": 100 + step}
        steps.append(cosines_of(plain, task_gradients(plain, name, inputs, TASKS, **seed)))
        plain.zero_grad()
        sum(losses_of(plain, inputs, **seed).values()).backward()
        model.zero_grad()
        profiler.backward(losses_of(model, inputs, **seed))
        for optimizer in optimizers:
            optimizer.step()
        assert_states_close(model, plain, tolerance=step * 1e-12)
    assert_map(profiler.conflict_map(), steps)


@every_model
def test_sketches_train_to_where_joint_training_does(name):
    plain, *models = (fresh(name) for _ in range(3))
    profilers = [
        recon.Profiler(model, memory=memory) for model, memory in zip(models, ("exact", "sketch"), strict=True)
    ]
    backwards = [lambda losses: sum(losses.values()).backward(), *(profiler.backward for profiler in profilers)]
    for model, backward in zip((plain, *models), backwards, strict=True):
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad()
            backward(losses_of(model, make_inputs(name, step), seed=step))
            optimizer.step()
    for model in models:
        assert_states_close(model, plain, tolerance=3e-12)
    exact, sketched = (profiler.conflict_map() for profiler in profilers)
    assert_same_pairs(sketched, exact)


@pytest.mark.parametrize("method", AGGREGATORS)
@every_model
def test_a_gradient_method_trains_to_the_same_bits(name, method):
    if (name, method) == ("SparseTables", "excessmtl"):
        pytest.skip("the method keeps what it cannot keep of sparse gradients")
    plain, model = (fresh(name, torch.float32) for _ in range(2))
    profiler = recon.Profiler(model)
    for one, profile in ((plain, None), (model, profiler)):
        solver, optimizer = methods.get(method), sgd(one)
        for step in range(3):
            losses = losses_of(one, make_inputs(name, step, torch.float32), seed=step)
            optimizer.zero_grad()
            recon.backward(losses, one, solver, profiler=profile)
            optimizer.step()
    assert_same_bits(model, plain)
    assert profiler.conflict_map().steps == 3


@pytest.mark.parametrize("method", WEIGHTINGS)
@every_model
def test_a_loss_weighting_trains_as_without_a_profiler(name, method):
    plain, model = fresh(name), fresh(name)
    profiler = recon.Profiler(model)
    weights = []
    for one, profile in ((plain, None), (model, profiler)):
        solver = methods.get(method)
        solver.setup(TASKS)
        optimizer = torch.optim.SGD([*one.parameters(), *solver.double().parameters()], lr=0.05)
        for step in range(4):
            losses = losses_of(one, make_inputs(name, step), seed=step)
            losses = {task: softplus(loss) for task, loss in losses.items()}  # some weightings want them positive
            optimizer.zero_grad()
            weights.append(recon.backward(losses, one, solver, profiler=profile))
            optimizer.step()
            solver.end_epoch()
    assert_states_close(model, plain, tolerance=4e-12)
    for theirs, ours in zip(weights[:4], weights[4:], strict=True):
        assert {task: float(w) for task, w in ours.items()} == pytest.approx(
            {task: float(w) for task, w in theirs.items()}, rel=1e-11
        )
    assert profiler.conflict_map().steps == 4


# Branched models.


def branch(name: str, kind: str, seed: int, mode: Mode) -> nn.Module:
    model = fresh(name)
    torch.manual_seed(seed)
    branched = recon.convert(model, oracle.random_plan(model, kind, seed), ZOO[name].inputs(4), mode=mode)
    oracle.perturb(branched, seed)
    return branched.train(not ZOO[name].draws)


def plain_gradients(branched: nn.Module, name: str, inputs: Any) -> dict[str, Gradients]:
    """What each task's loss gives the original architecture, loaded with the task's copies, under the copies' names."""
    named = dict(branched.named_parameters(remove_duplicate=False))
    first_name = {p: key for key, p in reversed(named.items())}
    found = {}
    for task in TASKS:
        plain = oracle.plain_model(ZOO[name].make, branched, task)
        keys = oracle.keys_of(branched, task, set(oracle.state_of(plain)))
        losses_of(plain, inputs)[task].backward()
        found[task] = {first_name[named[keys[key]]]: gradient for key, gradient in gradients_of(plain).items()}
    return found


def check_branched(name: str, kind: str, seed: int, mode: Mode) -> None:
    inputs, branched, again = make_inputs(name), branch(name, kind, seed, mode), branch(name, kind, seed, mode)
    gradients = plain_gradients(branched, name, inputs)
    total = {
        key: reduce(add, (by_key[key] for by_key in gradients.values() if key in by_key))
        for key, p in branched.named_parameters()
        if any(key in by_key for by_key in gradients.values())
    }
    profiler = recon.Profiler(branched)
    profiler.backward(losses_of(branched, inputs))
    assert_gradients_close(branched, total, tolerance=1e-9)  # of the sum over tasks: a fan adds in another order
    sum(losses_of(again, inputs).values()).backward()
    assert_gradients_close(branched, gradients_of(again))
    if name != "Checkpointed":
        assert_same_bits(branched, again)
    shared = shared_layers(branched, gradients)
    if not shared:
        with pytest.raises(UsageError, match="No layer is shared"):
            profiler.conflict_map()
        return
    cmap = profiler.conflict_map()
    assert [layer.name for layer in cmap.layers] == shared
    assert_map(cmap, [cosines_of(branched, gradients)])


@pytest.mark.parametrize("kind, seed, mode", [("quarter", 0, "fan"), ("all", 1, "per-task")])
@every_model
def test_a_branched_model(name, kind, seed, mode):
    check_branched(name, kind, seed, mode)


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize("seed", range(2, 12))
@every_model
def test_a_branched_model_of_many_plans(name, seed, mode):
    for kind in oracle.KINDS:
        check_branched(name, kind, seed, mode)


@every_model
def test_a_gradient_method_trains_a_branched_model_to_the_same_bits(name):
    method = AGGREGATORS[list(ZOO).index(name) % len(AGGREGATORS)]
    plain, branched = (branch(name, "quarter", 1, "fan").float() for _ in range(2))
    profiler = recon.Profiler(branched)
    for one, profile in ((plain, None), (branched, profiler)):
        solver, optimizer = methods.get(method), sgd(one)
        for step in range(2):
            optimizer.zero_grad()
            losses = losses_of(one, make_inputs(name, step, torch.float32), seed=step)
            recon.backward(losses, one, solver, profiler=profile)
            optimizer.step()
    assert_same_bits(branched, plain)
