import copy
import re
import time

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import recon
from recon.errors import GradientError, LoaderError, ProblemError, UnknownNameError, UsageError
from tests.methods.test_jacobian import TwoHeads
from tests.profiling.test_profiler import LOSSES, batches, sgd


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
    with pytest.raises(GradientError, match=r"loss of task 'a' is (nan|inf|-inf) in step 1 of epoch 1"):
        recon.train(model, list(batches(2)), losses, optimizer=sgd(model))


def test_the_optimizer_of_another_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"has no parameter of this model.* Make a new one from model\.parameters\(\)"):
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

    monkeypatch.setattr("recon.training.batches.batch_stream.global_states", untouched)
    monkeypatch.setattr("signal.signal", untouched)
    recon.train(model, list(batches(2)), LOSSES, optimizer=sgd(model))


def test_clipping_bounds_the_update_of_the_method(model):
    before = copy.deepcopy(model.state_dict())
    data = [(x, {task: 100 * y for task, y in targets.items()}) for x, targets in batches(1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recon.train(model, data, LOSSES, optimizer=optimizer, method="pcgrad", clip=0.25)
    moved = [(model.state_dict()[name] - before[name]).flatten() for name, _ in model.named_parameters()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.25, rel=1e-5)


def test_clipping_leaves_the_method_s_own_parameters_alone(model):
    method, plain = recon.methods.get("uw"), recon.methods.get("uw")
    data = list(batches(1))
    for each, clip in ((method, 1e-6), (plain, None)):
        net = copy.deepcopy(model)
        recon.train(net, data, LOSSES, optimizer=sgd(net), method=each, clip=clip)
    assert all(torch.equal(one, two) for one, two in zip(method.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_accumulation_takes_the_mean_of_the_batches_updates(model, method):
    data = [
        *batches(5),
        (torch.randn(8, 1, 6, 6), {}),
    ]  # the last step has one batch that counts, and one that does not
    data = [(x.double(), {task: y.double() for task, y in targets.items()}) for x, targets in data]
    model = model.double().eval()  # in evaluation mode, batches share no statistics
    model.train = lambda mode=True: model
    plain, chosen = copy.deepcopy(model), recon.methods.get(method)
    history = recon.train(model, data, LOSSES, optimizer=sgd(model), method=method, accumulate=2)
    assert history.steps == 3
    optimizer = sgd(plain)
    for group in (data[:2], data[2:4], data[4:5]):
        optimizer.zero_grad()
        for x, targets in group:
            out = plain(x)
            recon.backward({task: LOSSES[task](out[task], targets[task]) for task in LOSSES}, plain, chosen)
        for parameter in plain.parameters():
            parameter.grad /= len(group)
        optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("method", ["joint", "cagrad"])
def test_autocast_computes_the_forward_in_bfloat16_and_the_rest_in_float32(model, method, branched):
    if branched:
        x, _ = next(batches(1))
        model = recon.convert(model, recon.BranchPlan.per_task(["conv"], ("a", "b")), x)
    inside, outside = [], []
    model.heads["a"].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))

    def loss(out, target):
        outside.append((out.dtype, torch.is_autocast_enabled("cpu")))
        return LOSSES["a"](out, target)

    history = recon.train(
        model, list(batches(3)), LOSSES | {"a": loss}, optimizer=sgd(model), method=method, amp="bf16"
    )
    assert set(inside) == {torch.bfloat16} and set(outside) == {(torch.float32, False)}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters()) and history.epochs[0].skipped == 0


class Listens(recon.methods.Joint):
    """Hears of the model before the first forward pass, and of every step."""

    needs_new_losses = True

    def __init__(self):
        super().__init__()
        self.attached, self.heard = [], []

    def attach(self, model):
        assert self.tasks == ("a", "b")
        self.attached.append(model)

    def after_step(self, losses):
        assert all(not loss.requires_grad for loss in losses.values())
        self.heard.append({task: loss.item() for task, loss in losses.items()})


class Restless(TwoHeads):
    """Leaves traces of every forward: statistics, dropout, a count."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.calls = nn.BatchNorm2d(1), nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return super().forward(self.drop(self.first(x)))


def test_a_method_hears_what_the_step_did_to_the_losses_and_nothing_else_notices():
    data, states, calls = list(batches(6, a={2})), [], []
    for method in ("joint", listens := Listens()):
        torch.manual_seed(3)
        net = Restless()
        recon.train(net, data, LOSSES, optimizer=sgd(net), method=method)
        states.append((net.state_dict(), torch.get_rng_state()))
        calls.append(net.calls)
    (one, chance), (other, other_chance) = states
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and torch.equal(chance, other_chance)
    assert calls == [6, 6] and listens.attached == [net]
    assert [set(losses) for losses in listens.heard] == [{"a", "b"}, {"a", "b"}, {"b"}] + 3 * [{"a", "b"}]


def test_the_new_losses_are_those_of_the_new_weights(model):
    (x, targets), *_ = data = list(batches(1))
    listens = Listens()
    recon.train(model, data, LOSSES, optimizer=sgd(model), method=listens)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        out = model.train()(x)
    assert listens.heard == [{task: LOSSES[task](out[task], targets[task]).item() for task in LOSSES}]
    model.load_state_dict(state)


def test_options_that_cannot_be(model):
    data = list(batches(1))
    for options, words in (
        ({"clip": 0}, "clip is 0; give a norm above 0"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"clip": "1"}, "clip is '1'"),
        ({"accumulate": 0}, "accumulate is 0; a step needs at least 1 batch"),
        ({"amp": "fp16"}, "amp='fp16' needs a GPU.*Use amp='bf16'"),
        ({"amp": "fp8"}, "amp is 'fp8'. Choose 'bf16', 'fp16' or None"),
    ):
        with pytest.raises(UsageError, match=words):
            recon.train(model, data, LOSSES, optimizer=sgd(model), **options)


def test_accumulation_goes_on_after_an_interruption_as_if_nothing_had_happened(tmp_path):
    class CrashError(Exception):
        pass

    def train(crash_at=None, seed=5, **options):
        calls = []

        def loss(out, target):
            calls.append(1)
            if len(calls) == crash_at:
                raise CrashError
            return LOSSES["a"](out, target)

        torch.manual_seed(seed)
        net = Restless()
        options = {"accumulate": 3, "epochs": 2, "clip": 1.0, "method": "pcgrad", **options}
        recon.train(net, list(batches(7)), LOSSES | {"a": loss}, optimizer=sgd(net), **options)
        return net.state_dict()

    whole = train()
    path = tmp_path / "run.checkpoint"
    for crash_at in (5, 5, 2):  # in the middle of a step's batches
        with pytest.raises(CrashError):
            train(crash_at, checkpoint=path, resume=True, checkpoint_seconds=0)
    resumed = train(seed=9, checkpoint=path, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(recon.errors.CheckpointError, match="accumulate is 2 now, but was 3"):
        train(accumulate=2, checkpoint=path, resume=True)


def test_the_bar_shows_throughput_and_losses(model, monkeypatch, capsys):
    monkeypatch.setattr("recon.training.trainer._BAR_SECONDS", 0.0)
    data = [(x, targets) for x, targets in batches(4)]

    def slow(out, target):
        time.sleep(0.06)  # tqdm draws ten times a second
        return LOSSES["a"](out, target)

    recon.train(model, data, LOSSES | {"a": slow}, optimizer=sgd(model), progress=True, accumulate=2)
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "batch" in shown and re.search(r"a=\d+\.\d+, b=\d+\.\d+", shown)


def test_an_optimizer_or_a_recorder_that_is_none_is_refused():
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"optimizer is None\. Make one"):
        recon.train(model, [], {"a": torch.nn.functional.mse_loss}, optimizer=None)
    with pytest.raises(UsageError, match=r"optimizer is None\. Make one"):
        recon.profile(model, [], {"a": torch.nn.functional.mse_loss}, optimizer=None)
    with pytest.raises(UsageError, match=r"recorder is 'x.jsonl'. Pass recon.Recorder"):
        recon.train(model, [], {"a": torch.nn.functional.mse_loss}, optimizer=sgd, recorder="x.jsonl")


class _TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 2)

    def forward(self, x):
        a, b = self.stem(x).unbind(dim=1)
        return {"a": a, "b": b}


def _train_two(loader, **options):
    model = _TwoOutputs()
    losses = dict.fromkeys("ab", torch.nn.functional.mse_loss)
    return recon.train(model, loader, losses, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_misspelt_target_is_told_in_the_first_batch(caplog):
    batch = (torch.ones(3, 2), {"a": torch.ones(3), "B": torch.ones(3)})
    with pytest.raises(ProblemError, match="No batch of epoch 1 had a target for 'b'"):
        _train_two([batch] * 3)
    (warning,) = caplog.messages
    assert "no target for 'b', but it has targets for 'B', which are not tasks" in warning


def test_a_generator_serves_one_epoch():
    batches = ((torch.ones(3, 2), {"a": torch.ones(3), "b": torch.ones(3)}) for _ in range(3))
    with pytest.raises(ProblemError, match=r"gave no batch in epoch 2\. A loader that can be used only once"):
        _train_two(batches, epochs=2)


class Sharp(torch.optim.SGD):
    """Computes the losses twice a step."""

    def step(self, closure): ...


class Wrapped(torch.optim.SGD):
    """As other libraries wrap an optimizer."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharp], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("use", [recon.train, recon.profile], ids=lambda use: use.__name__)
def test_an_optimizer_that_needs_a_closure_is_refused_before_anything_is_done(model, use, kind):
    def loader():
        raise AssertionError("a batch was asked for")
        yield

    optimizer = kind(model.parameters(), lr=0.1)
    StepLR(optimizer, 1)  # which wraps its step
    with pytest.raises(
        UsageError, match=rf"{kind.__name__}\.step needs closure.* recon\.backward\(losses, model, method\)"
    ):
        use(model, loader(), LOSSES, optimizer=optimizer)


def test_an_optimizer_whose_step_takes_anything(model):
    assert recon.train(model, list(batches(2)), LOSSES, optimizer=Wrapped(model.parameters(), lr=0.1)).steps == 2


@pytest.mark.parametrize("use", [recon.train, recon.profile], ids=lambda use: use.__name__)
def test_a_scheduler_is_no_optimizer(model, use):
    with pytest.raises(UsageError, match=r"learning rate scheduler \(StepLR\)\. Pass optimizer=scheduler\.optimizer"):
        use(model, list(batches(2)), LOSSES, optimizer=StepLR(sgd(model), 1))


def test_what_cannot_be_run_is_no_model(model):
    with pytest.raises(UsageError, match="model is a list, which cannot be run"):
        recon.train([model], list(batches(2)), LOSSES, optimizer=sgd(model))
