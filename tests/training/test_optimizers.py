"""Several optimizers that train one model: what each moves, their schedulers and checkpoints, and what is refused."""

import logging

import pytest
import torch
from torch.optim import SGD, Adam, SparseAdam
from torch.optim.lr_scheduler import StepLR

import recon
from recon.errors import CheckpointError, UsageError
from tests.methods.test_sparse_gradients import TASKS, batches, make

LOSSES = dict.fromkeys(TASKS, torch.nn.functional.mse_loss)


def data(count=3):
    draw = torch.Generator().manual_seed(2)
    target = torch.rand(count, 8, 1, generator=draw, dtype=torch.float64)
    return [(ids, dict.fromkeys(TASKS, y)) for ids, y in zip(batches(count), target, strict=True)]


def parts(model):
    """The tables and everything else."""
    tables = [model.words.weight, model.bag.weight, model.own.weight]
    return tables, [p for name, p in model.named_parameters() if name.startswith(("body", "heads"))]


def both(model, lr=0.02):
    tables, others = parts(model)
    return [SparseAdam(tables, lr=lr), Adam(others, lr=lr)]


def train(make_optimizer=both, **options):
    model = make(True)
    options = {"epochs": 2, **options}
    recon.train(model, data(), LOSSES, optimizer=make_optimizer(model), **options)
    return model


def assert_equal(model, other, exact=True):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, **({"atol": 0, "rtol": 0} if exact else {"atol": 1e-12, "rtol": 1e-9}))


def by_hand(schedulers=0, epochs=2):
    """The same training in torch alone."""
    model = make(True)
    optimizers = both(model)
    schedules = [StepLR(optimizer, 2, gamma=0.5) for optimizer in optimizers[:schedulers]]
    for _ in range(epochs):
        for ids, targets in data():
            for optimizer in optimizers:
                optimizer.zero_grad()
            out = model(ids)
            sum(LOSSES[task](out[task], targets[task]) for task in TASKS).backward()
            for stepping in (*optimizers, *schedules):
                stepping.step()
    return model


def test_all_step():
    assert_equal(train(), by_hand(), exact=False)


def test_a_function_makes_a_scheduler_of_each():
    found = train(scheduler=lambda optimizer: StepLR(optimizer, 2, gamma=0.5))
    assert_equal(found, by_hand(schedulers=2), exact=False)


def test_a_list_has_a_scheduler_for_each_or_none():
    model = make(True)
    optimizers = both(model)
    schedulers = [StepLR(optimizers[0], 2, gamma=0.5), None]
    recon.train(model, data(), LOSSES, optimizer=optimizers, scheduler=schedulers, epochs=2)
    assert_equal(model, by_hand(schedulers=1), exact=False)


def test_profiling_notes_all():
    model = make(True)
    cmap = recon.profile(model, data(), LOSSES, optimizer=both(model), epochs=2)
    assert cmap.made_by["optimizer"] == "SparseAdam + Adam"
    assert_equal(model, by_hand(), exact=False)


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_a_checkpoint_goes_on_to_the_bit(tmp_path, method):
    options = {"method": method, "scheduler": lambda optimizer: StepLR(optimizer, 4, gamma=0.5)}
    whole = train(**options, epochs=4)
    train(**options, epochs=2, checkpoint=tmp_path / "run")
    resumed = train(**options, epochs=4, checkpoint=tmp_path / "run", resume=True)
    assert_equal(resumed, whole)


def test_a_checkpoint_of_other_optimizers_is_refused(tmp_path):
    train(checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer is SGD now, but was SparseAdam \+ Adam"):
        train(lambda model: SGD(model.parameters(), 0.1), checkpoint=tmp_path / "run", resume=True)


def test_a_method_that_learns_goes_to_the_first_that_takes_its_gradients():
    model, method = make(True), recon.methods.get("uw")
    optimizers = both(model)
    recon.train(model, data(), LOSSES, optimizer=optimizers, method=method)
    assert [len(optimizer.param_groups) for optimizer in optimizers] == [1, 2]
    assert all(p.any() for p in method.parameters())
    with pytest.raises(UsageError, match=r"'uw' has parameters of its own.* optimizer=\[SparseAdam\(\.\.\.\), Adam"):
        train(lambda model: SparseAdam(parts(model)[0]), method="uw")
    with pytest.raises(UsageError, match="must know them from the start"):
        optimizers = both(model := make(True))
        schedulers = [StepLR(optimizer, 2) for optimizer in optimizers]
        recon.train(model, data(), LOSSES, optimizer=optimizers, scheduler=schedulers, method="uw")


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda m: SparseAdam(list(m.parameters())), r"SparseAdam does not take .* sparse for words.*dense for body"),
        (lambda m: Adam(m.parameters()), r"Adam does not take .* sparse for words\.weight, bag.*SparseAdam\(tables\)"),
        (lambda m: SGD(m.parameters(), 0.1, weight_decay=0.1), r"SGD does not take these gradients"),
        (lambda m: [SparseAdam(parts(m)[0]), Adam(m.parameters())], r"Two optimizers have .* bag\.weight.*each would"),
        (lambda m: [SparseAdam(parts(m)[0]), Adam(make(True).parameters())], r"optimizer Adam has no parameter of"),
        (lambda m: [], "empty list"),
        (lambda m: [SparseAdam(parts(m)[0]), "adam"], "optimizer is 'adam'"),
    ],
    ids=["dense", "sparse", "decay", "twice", "another", "none", "no optimizer"],
)
def test_what_does_not_go_together_is_refused(make_optimizer, message):
    with pytest.raises(UsageError, match=message):
        train(make_optimizer)


def test_schedulers_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="1 schedulers for 2 optimizers"):
        train(scheduler=[lambda optimizer: StepLR(optimizer, 2)])
    model = make(True)
    one, other = both(model)
    with pytest.raises(UsageError, match="StepLR in place 1 belongs to another optimizer than the SparseAdam"):
        schedulers = [StepLR(other, 2), StepLR(one, 2)]
        recon.train(model, data(), LOSSES, optimizer=[one, other], scheduler=schedulers)


def test_a_scheduler_of_its_own_is_one_of_the_optimizer():
    model = make(True)
    one, other = both(model)
    with pytest.raises(UsageError, match=r"there are 2\. Pass a list"):
        recon.train(model, data(), LOSSES, optimizer=[one, other], scheduler=StepLR(one, 2))
    dense = make(False)
    of_another = StepLR(torch.optim.SGD(dense.parameters(), 0.1), 2)
    with pytest.raises(UsageError, match="of another optimizer than the one that trains"):
        recon.train(dense, data(), LOSSES, optimizer=torch.optim.SGD(dense.parameters(), 0.1), scheduler=of_another)


def test_parameters_that_no_optimizer_has_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        train(lambda model: SparseAdam(parts(model)[0]))
    assert "No optimizer has the parameters body.weight, body.bias, heads.a.weight" in caplog.text
    caplog.clear()
    train()
    assert not caplog.records


@pytest.mark.parametrize("options", [{"clip": 0.1}, {"accumulate": 2}, {"amp": "bf16"}], ids=str)
def test_sparse_gradients_train_as_dense_ones(options):
    models = []
    for is_sparse in (True, False):
        model = make(is_sparse)
        optimizer = SGD(model.parameters(), lr=0.1)
        recon.train(model, data(4), LOSSES, optimizer=optimizer, method="pcgrad", epochs=2, **options)
        models.append(model)
    assert_equal(*models, exact=False)


def test_a_gradient_that_is_not_finite_is_found_in_a_sparse_one():
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    model = make(True)
    words = model.words.forward
    model.words.forward = lambda ids: Infinite.apply(words(ids))
    with pytest.raises(recon.errors.GradientError, match="not finite"):
        recon.train(model, data(), LOSSES, optimizer=both(model))
