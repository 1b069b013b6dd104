import copy

import pytest
import torch
from torch import nn

import recon
from recon.errors import GradientError, LoaderError, ProblemError, UnknownNameError, UsageError
from tests.test_gradients import TwoHeads
from tests.test_profiler import LOSSES, batches, sgd


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads()


def test_joint_training_is_ordinary_training(model):
    plain = copy.deepcopy(model)
    recon.train(model, list(batches(10)), LOSSES, optimizer=sgd(model), epochs=2)
    optimizer = sgd(plain)
    for _ in range(2):
        for x, targets in batches(10):
            out = plain(x)
            optimizer.zero_grad()
            sum(loss(out[task], targets[task]) for task, loss in LOSSES.items()).backward()
            optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("method", ["joint", "uw", "dwa:temperature=1.0", "pcgrad", "cagrad:c=0.5", "mgda"])
def test_every_method_lowers_the_losses(model, method, branched):
    if branched:
        x, _ = next(batches(1))
        model = recon.convert(model, recon.BranchPlan.per_task(["conv"], ("a", "b")), x)
    torch.manual_seed(5)
    teacher = TwoHeads().eval()
    data = [(x, {task: out.detach() for task, out in teacher(x).items()}) for x, _ in batches(20)]
    history = recon.train(
        model, data, LOSSES, optimizer=torch.optim.Adam(model.parameters(), 0.01), method=method, epochs=4
    )
    first, last = history.epochs[0], history.epochs[-1]
    assert all(last.losses[task] < 0.7 * first.losses[task] for task in LOSSES)
    assert history.steps == 80 and history.seconds > 0 and [e.number for e in history.epochs] == [1, 2, 3, 4]
    assert set(last.weights) == {"a", "b"}


def test_the_same_seed_gives_the_same_training():
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        model = TwoHeads()
        recon.train(model, list(batches(10)), LOSSES, optimizer=sgd(model), method="pcgrad")
        states.append(model.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values(), strict=True))


def test_a_single_task_trains_alone(model):
    before = copy.deepcopy(model.state_dict())
    history = recon.train(model, list(batches(5)), {"b": LOSSES["b"]}, optimizer=sgd(model))
    assert list(history.epochs[0].losses) == ["b"]
    after = model.state_dict()
    assert torch.equal(before["heads.a.weight"], after["heads.a.weight"])
    assert not torch.equal(before["heads.b.weight"], after["heads.b.weight"])


def test_missing_targets_are_skipped(model):
    data = [*batches(6, a={0, 1}, b={5}), (torch.randn(8, 1, 6, 6), {}), (torch.randn(8, 1, 6, 6), {"a": None})]
    history = recon.train(model, data, LOSSES, optimizer=sgd(model), method="pcgrad")
    assert history.steps == 6


def test_losses_and_weights_are_means_over_the_steps_of_the_task(model):
    data = list(batches(4, a={0}))
    seen = {"a": [], "b": []}

    def recorded(task):
        def loss(out, target):
            seen[task].append(LOSSES[task](out, target))
            return seen[task][-1]

        return loss

    epoch = recon.train(model, data, {t: recorded(t) for t in LOSSES}, optimizer=sgd(model)).epochs[0]
    assert len(seen["a"]) == 3 and len(seen["b"]) == 4
    for task in LOSSES:
        assert epoch.losses[task] == pytest.approx(torch.stack(seen[task]).mean().item())
    assert epoch.weights == {"a": 1.0, "b": 1.0}


def test_a_learned_weighting_is_trained_without_weight_decay(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    method = recon.methods.get("uw")
    recon.train(model, list(batches(5)), LOSSES, optimizer=optimizer, method=method)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.abs() > 0 for p in method.parameters())


def test_a_scheduler_steps_with_the_optimizer(model):
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    recon.train(model, list(batches(4)), LOSSES, optimizer=optimizer, scheduler=scheduler, epochs=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)


def test_a_scheduler_and_a_method_that_learns(model):
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    with pytest.raises(UsageError, match="scheduler=lambda optimizer"):
        recon.train(model, list(batches(2)), LOSSES, optimizer=optimizer, scheduler=scheduler, method="uw")
    optimizer = sgd(model)
    recon.train(
        model,
        list(batches(4)),
        LOSSES,
        optimizer=optimizer,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5),
        method="uw",
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


def test_on_epoch_sees_every_epoch(model):
    seen = []
    recon.train(model, list(batches(2)), LOSSES, optimizer=sgd(model), epochs=3, on_epoch=seen.append)
    assert [epoch.number for epoch in seen] == [1, 2, 3]


def test_bad_calls(model):
    data = list(batches(2))
    with pytest.raises(UsageError, match="epochs is 0"):
        recon.train(model, data, LOSSES, optimizer=sgd(model), epochs=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'pcgrad'"):
        recon.train(model, data, LOSSES, optimizer=sgd(model), method="pcgard")
    with pytest.raises(ProblemError, match="no entry for task 'c'"):
        recon.train(model, [(x, y | {"c": y["a"]}) for x, y in data], LOSSES | {"c": LOSSES["a"]}, optimizer=sgd(model))
    with pytest.raises(ProblemError, match=r"loss of task 'a' must be a scalar tensor, but is shape \(8, 3\)"):
        recon.train(model, data, LOSSES | {"a": lambda out, target: out - target}, optimizer=sgd(model))
    with pytest.raises(ProblemError, match="No batch of epoch 1"):
        recon.train(model, [], LOSSES, optimizer=sgd(model))
    with pytest.raises(ProblemError, match=r"\(inputs, \{task name: target\}\)"):
        recon.train(model, [torch.zeros(3)], LOSSES, optimizer=sgd(model))
    with pytest.raises(ProblemError, match="returned Tensor"):
        recon.train(plain := nn.Conv2d(1, 1, 1), data, LOSSES, optimizer=sgd(plain))


def test_a_loss_that_becomes_infinite_names_task_and_step(model):
    losses = LOSSES | {"a": lambda out, target: out.sum() / (target.sum() * 0)}
    with pytest.raises(GradientError, match=r"loss of task 'a' is (nan|inf|-inf) near step 1 of epoch 1"):
        recon.train(model, list(batches(2)), losses, optimizer=sgd(model))


def test_the_optimizer_of_another_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"holds no parameter of this model.* Make it of model\.parameters\(\) anew"):
        recon.train(
            model, [], {"a": torch.nn.functional.mse_loss}, optimizer=torch.optim.SGD(other.parameters(), lr=0.1)
        )


def test_stop_ends_the_training_after_a_step(model):
    method, asked, seen = recon.methods.get("dwa"), [], []

    def stop():
        asked.append(1)
        return len(asked) == 7

    history = recon.train(
        model,
        list(batches(5)),
        LOSSES,
        optimizer=sgd(model),
        method=method,
        epochs=4,
        stop=stop,
        on_epoch=seen.append,
    )
    assert [(epoch.number, epoch.steps) for epoch in history.epochs] == [(1, 5), (2, 2)]
    assert seen == history.epochs and history.steps == len(asked) == 7
    assert set(history.epochs[1].losses) == set(history.epochs[1].weights) == {"a", "b"}


def test_a_stopped_epoch_may_lack_a_task(model):
    history = recon.train(model, list(batches(3, a={0})), LOSSES, optimizer=sgd(model), stop=lambda: True)
    assert history.steps == 1 and set(history.epochs[0].losses) == {"b"}


def test_a_loader_that_raises_is_named_with_batch_and_epoch(model):
    def broken():
        yield from batches(2)
        raise OSError("no such picture")

    class Loader:
        __iter__ = staticmethod(broken)

    with pytest.raises(LoaderError, match=r"OSError: no such picture \(.*:\d+, in broken\), .* batch 3 of epoch 1"):
        recon.train(model, Loader(), LOSSES, optimizer=sgd(model))
    with pytest.raises(LoaderError, match=r"TypeError: .* batch 1 of epoch 1"):
        recon.train(model, 5, LOSSES, optimizer=sgd(model))


def test_training_without_a_checkpoint_leaves_the_random_states_and_signals_alone(model, monkeypatch):
    def untouched(*args):
        raise AssertionError("not asked for")

    monkeypatch.setattr("recon.batch_stream.global_states", untouched)
    monkeypatch.setattr("signal.signal", untouched)
    recon.train(model, list(batches(2)), LOSSES, optimizer=sgd(model))
