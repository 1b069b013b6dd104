"""TorchJD's own objects as methods, and what of TorchJD the adapter relies on or defuses."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization

import recon
from recon import methods
from recon.errors import GradientError, UsageError
from tests.task_gradients import gradients

TASKS = ("seg", "depth", "normal")

ON_GRAMIANS = {
    "PCGrad": aggregation.PCGrad,
    "AlignedMTL": lambda: aggregation.AlignedMTL(torch.tensor([1.0, 2.0, 3.0])),
    "GradVacWeighting": aggregation.GradVacWeighting,
    "MoDoWeighting": aggregation.MoDoWeighting,
    "SDMGradWeighting": aggregation.SDMGradWeighting,
    "CRMOGMWeighting": lambda: aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting()),
}
ON_GRADIENTS = {
    "ConFIG": aggregation.ConFIG,
    "GradDrop": aggregation.GradDrop,
    "ExcessMTL": aggregation.ExcessMTL,
    "Random": aggregation.Random,
    "MeanWeighting": aggregation.MeanWeighting,
    "Constant": lambda: aggregation.Constant(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "TrimmedMean": lambda: aggregation.TrimmedMean(1),
}
AGGREGATORS = {**ON_GRAMIANS, **ON_GRADIENTS}
SCALARIZERS = {
    "Mean": scalarization.Mean,
    "GeometricMean": scalarization.GeometricMean,
    "DWA": scalarization.DWA,
    "UW": lambda: scalarization.UW(3),
    "Random": scalarization.Random,
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS)
every_scalarizer = pytest.mark.parametrize("make", SCALARIZERS.values(), ids=SCALARIZERS)


def wrapped(make) -> methods.Method:
    method = methods.wrap(make())
    method.setup(TASKS)
    return method


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def losses_of(*values: float) -> dict[str, torch.Tensor]:
    return {task: torch.tensor(value, requires_grad=True) for task, value in zip(TASKS, values, strict=True)}


# --- what wrap gives --------------------------------------------------------------------------------------


def test_wrap_tells_what_an_object_needs():
    for make in ON_GRAMIANS.values():
        assert isinstance(methods.wrap(make()), methods.GramianAggregator)
    for make in ON_GRADIENTS.values():
        method = methods.wrap(make())
        assert isinstance(method, methods.Aggregator)
        assert not isinstance(method, methods.GramianAggregator)
    for make in SCALARIZERS.values():
        assert isinstance(methods.wrap(make()), methods.Weighting)


def test_wrap_leaves_methods_alone_and_refuses_the_rest():
    method = methods.get("pcgrad")
    assert methods.wrap(method) is method
    for thing in ("pcgrad", nn.Linear(1, 1), aggregation.PCGrad):
        with pytest.raises(UsageError, match="not a method"):
            methods.wrap(thing)


def test_an_object_is_always_the_same_method():
    thing = aggregation.PCGrad()
    assert methods.wrap(thing) is methods.wrap(thing)
    assert methods.wrap(thing) is not methods.wrap(aggregation.PCGrad())
    assert methods.wrap(thing).name == "PCGrad"
    assert len(list(thing.modules())) == len(list(aggregation.PCGrad().modules()))


@every_aggregator
def test_the_update_is_torchjds(make):
    """Its own scale, its random numbers from the method's stream, whatever the global one is."""
    method = wrapped(make)
    thing = make()
    for seed in range(3):
        J = gradients("conflicting", 3, seed)
        product = isinstance(thing, (aggregation.MoDoWeighting, aggregation.SDMGradWeighting))
        with torch.random.fork_rng():
            torch.set_rng_state(method.stream.get_extra_state())
            if isinstance(thing, aggregation.AlignedMTL):  # its preference vector is float32
                expected = thing(J.float()).double()
            elif isinstance(thing, aggregation.Aggregator):
                expected = thing(J)
            else:
                takes_gramian = product or isinstance(method, methods.GramianAggregator)
                expected = thing(J @ J.T if takes_gramian else J) @ J
        before = torch.get_rng_state()
        torch.testing.assert_close(method(J), expected, rtol=1e-4, atol=1e-4)
        assert torch.get_rng_state().equal(before)


@every_aggregator
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_refused_by_name(make, bad):
    J = gradients("random", 3)
    J[1, 2] = bad
    with pytest.raises(GradientError, match=r"task 1 \('depth'\) is not finite"):
        wrapped(make)(J)


@pytest.mark.parametrize("name", ["PCGrad", "ConFIG", "GradDrop", "Random", "TrimmedMean", "ExcessMTL"])
def test_bfloat16_gradients_are_taken(name):
    J = gradients("agreeing", 3).bfloat16()
    update = wrapped(AGGREGATORS[name])(J)
    assert update.dtype == torch.bfloat16
    assert update.isfinite().all()


@every_aggregator
def test_state_continues_to_the_bit(make):
    method, resumed = wrapped(make), wrapped(make)
    for seed in range(3):
        method(gradients("conflicting", 3, seed))
    resumed.load_state_dict(through_a_file(method.state_dict()))
    for seed in range(3, 6):
        J = gradients("conflicting", 3, seed)
        assert resumed(J).equal(method(J))


def test_an_empty_state_is_loaded_into_a_used_object():
    make = AGGREGATORS["GradVacWeighting"]
    method, used = wrapped(make), wrapped(make)
    used(gradients("random", 3))
    used.load_state_dict(through_a_file(method.state_dict()))
    J = gradients("conflicting", 3)
    assert used(J).equal(method(J))


# --- scalarizers ------------------------------------------------------------------------------------------


@every_scalarizer
def test_a_scalarizers_weights_are_those_of_its_backward_pass(make):
    method = wrapped(make)
    for values in ((3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (2.0, 2.0, 5.0)):
        method.combine(losses_of(*values))
        method.end_epoch()
    losses = losses_of(1.0, 2.0, 4.0)
    total, weights = method.combine(losses)
    total.backward()
    for task, loss in losses.items():
        torch.testing.assert_close(weights[task], loss.grad)
    J = gradients("random", 3)
    torch.testing.assert_close(method(J), torch.stack(list(weights.values())).double() @ J)


@every_scalarizer
def test_a_scalarizers_state_continues(make):
    method, resumed = wrapped(make), wrapped(make)
    for values in ((3.0, 2.0, 1.0), (1.0, 2.0, 3.0)):
        method.combine(losses_of(*values))
        method.end_epoch()
    method.combine(losses_of(1.0, 2.0, 3.0))
    resumed.load_state_dict(through_a_file(method.state_dict()))
    for _ in range(3):
        assert resumed.combine(losses_of(2.0, 1.0, 4.0)) == method.combine(losses_of(2.0, 1.0, 4.0))
        method.end_epoch()
        resumed.end_epoch()


def test_a_scalarizers_weights_are_geometric_means_derivative():
    total, weights = wrapped(scalarization.GeometricMean).combine(losses_of(1.0, 2.0, 4.0))
    assert total.item() == pytest.approx(2.0)
    assert [w.item() for w in weights.values()] == pytest.approx([2 / 3, 1 / 3, 1 / 6])


def test_famo_hears_of_the_new_losses():
    method = wrapped(lambda: scalarization.FAMO(3))
    assert method.needs_new_losses
    _, before = method.combine(losses_of(1.0, 2.0, 4.0))
    method.after_step({task: loss.detach() for task, loss in losses_of(1.0, 1.0, 4.0).items()})
    _, after = method.combine(losses_of(1.0, 2.0, 4.0))
    assert after["depth"] < before["depth"]


# --- in a training ----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def forward(self, x):
        features = torch.tanh(self.body(x))
        return {task: head(features) for task, head in self.heads.items()}


@pytest.fixture
def training():
    torch.manual_seed(0)
    x = torch.randn(12, 4)
    loader = [(part, {task: part[:, i : i + 1] for i, task in enumerate(TASKS)}) for part in x.split(4)]
    return Net(), loader


@pytest.mark.parametrize(
    "make", [*AGGREGATORS.values(), *SCALARIZERS.values()], ids=[*AGGREGATORS, *(f"losses-{s}" for s in SCALARIZERS)]
)
def test_train_and_backward_take_the_object_as_it_is(training, make):
    model, loader = training
    model = model.double()
    loader = [(x.double(), {task: y.double() for task, y in targets.items()}) for x, targets in loader]
    loss = nn.functional.mse_loss
    before = model.body.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recon.train(model, loader, dict.fromkeys(TASKS, loss), optimizer=optimizer, method=make())
    assert model.body.weight.isfinite().all()
    assert not model.body.weight.equal(before)

    thing = make()
    x, targets = loader[0]
    gradients_so_far = []
    for _ in range(2):
        model.zero_grad()
        outputs = model(x)
        recon.backward({task: loss(outputs[task], targets[task]) for task in TASKS}, model, thing)
        gradients_so_far.append(model.body.weight.grad.clone())
    assert gradients_so_far[0].isfinite().all()
    if isinstance(thing, (aggregation.GradDrop, aggregation.Random)):  # the stream goes on
        assert not gradients_so_far[0].equal(gradients_so_far[1])


@pytest.mark.parametrize("name", methods.names()[3:])
def test_every_aggregator_trains_with_missing_labels(training, name):
    model, loader = training
    x, targets = loader[1]
    loader[1] = (x, {"seg": targets["seg"], "normal": targets["normal"]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = dict.fromkeys(TASKS, nn.functional.mse_loss)
    history = recon.train(model, loader, losses, optimizer=optimizer, method=name, epochs=2)
    assert all(p.isfinite().all() for p in model.parameters())
    weights = history.epochs[-1].weights
    assert set(weights) == (set() if name == "graddrop" else set(TASKS))


# --- what TorchJD does, which ours must not ---------------------------------------------------------------


def test_torchjd_takes_no_notice_of_a_nan():
    """Should this fail, TorchJD has become stricter, and `_finite` could be left to it."""
    G = torch.full((2, 2), math.nan)
    assert aggregation.PCGradWeighting()(G).equal(torch.ones(2))
    with pytest.raises(GradientError):
        methods.get("pcgrad").weights(G)


def test_torchjd_scales_differ_and_ours_do_not():
    J = torch.ones(4, 7, dtype=torch.float64)
    assert aggregation.PCGrad()(J)[0].item() == pytest.approx(4)
    assert aggregation.AlignedMTL()(J)[0].item() == pytest.approx(1)
    for name in ("pcgrad", "aligned-mtl", "sdmgrad", "modo"):
        torch.testing.assert_close(methods.get(name)(J), 4 * J[0])


@pytest.mark.parametrize(
    ("weighting", "attribute"),
    [
        (aggregation.GradVacWeighting(), "_phi_t"),
        (aggregation.SDMGradWeighting(), "_w"),
        (aggregation.MoDoWeighting(), "_lambda"),
    ],
)
def test_torchjd_keeps_its_state_where_the_adapter_looks(weighting, attribute):
    G = gradients("conflicting", 3) @ gradients("conflicting", 3).T
    weighting(G)
    state = getattr(weighting, attribute)
    assert len(state) == 3
    assert weighting._state_key[:2] == (3, torch.float64)
    # Its state does not survive a file: a fresh object knows nothing of these buffers.
    with pytest.raises(RuntimeError, match="Unexpected key"):
        type(weighting)().load_state_dict(weighting.state_dict())
