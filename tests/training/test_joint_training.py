"""Batches of single tasks, alone, mixed and gathered: trained on and profiled as batches of all tasks are."""

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import recon
from recon.errors import GradientError, ProblemError, UsageError
from recon.experiments.costs import TrainingStep
from recon.experiments.inputs import example_inputs, first_batch

TASKS = ("a", "b", "c")
LOSSES = dict.fromkeys(TASKS, mse_loss)


class Net(nn.Module):
    """No batch statistics: what one forward computes, several do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x):
        features = self.body(x)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net():
    torch.manual_seed(1)
    return Net()


def shared_batches(count=6, size=8):
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=draw)
        batches.append((x, {task: (0.3 * x.sum(1) * n).sin() for n, task in enumerate(TASKS, start=-1)}))
    return batches


def joint(batch):
    """The same, with inputs for each task."""
    x, targets = batch
    return {task: (x, target) for task, target in targets.items()}


def one_by_one(batches):
    return [(x, {task: target}) for x, targets in batches for task, target in targets.items()]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def trained(batches, **options):
    model = net()
    history = recon.train(model, batches, LOSSES, optimizer=sgd(model), epochs=2, **options)
    return model, history


def assert_same_weights(model, other, atol=1e-13):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


METHODS = ["joint", "uw", "pcgrad", "cagrad", "famo", "gradnorm:layer=body.2", "uw+mgda"]


@pytest.mark.parametrize("method", METHODS)
def test_a_joint_step_is_the_step_of_one_forward_on_the_same_samples(method):
    whole = shared_batches()
    expected, history = trained(whole, method=method)
    mixed = [batch if n % 2 else joint(batch) for n, batch in enumerate(whole)]
    for batches, options in (
        ([joint(batch) for batch in whole], {}),
        (mixed, {}),
        (one_by_one(whole), {"accumulate": "tasks"}),
    ):
        model, found = trained(batches, method=method, **options)
        assert_same_weights(model, expected)
        for ours, theirs in zip(found.epochs, history.epochs, strict=True):
            assert ours.steps == theirs.steps == 6
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-12)
            assert ours.weights == pytest.approx(theirs.weights, rel=1e-9)


@pytest.mark.parametrize("options", [{"clip": 0.05}, {"accumulate": 3}], ids=["clip", "three"])
def test_clipping_and_accumulating_of_joint_steps(options):
    whole = shared_batches()
    expected, _ = trained(whole, method="pcgrad", **options)
    model, _ = trained([joint(batch) for batch in whole], method="pcgrad", **options)
    assert_same_weights(model, expected)
    plain, _ = trained(whole, method="pcgrad")
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_autocast_of_joint_steps():
    torch.set_default_dtype(torch.float32)  # what autocast makes less of
    (x, y), model, by_hand = shared_batches(1)[0], net(), net()
    x, y = x.float(), {task: target.float() for task, target in y.items()}
    seen = []
    model.body.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    recon.train(model, [joint((x, y))], LOSSES, optimizer=torch.optim.SGD(model.parameters(), 0.1), amp="bf16")
    for task in TASKS:
        with torch.autocast("cpu", torch.bfloat16):
            output = by_hand(x)[task].float()
        mse_loss(output, y[task]).backward()
    torch.optim.SGD(by_hand.parameters(), 0.1).step()
    assert seen == [torch.bfloat16] * 3
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # float32 gradients, added in another order


@pytest.mark.parametrize("memory", ["exact", "sketch"])
@pytest.mark.parametrize("method", ["joint", "uw", "pcgrad", "cagrad"])
def test_a_joint_profile_is_that_of_one_forward(method, memory):
    if memory == "sketch" and method in ("pcgrad", "cagrad"):
        pytest.skip("works from the task gradients, which sketches do not keep")
    whole, maps, models = shared_batches(12), [], []
    for batches, options in (
        (whole, {}),
        ([joint(batch) for batch in whole], {}),
        (one_by_one(whole), {"accumulate": "tasks"}),
    ):
        models.append(net())
        torch.manual_seed(2)  # of the sketches
        maps.append(
            recon.profile(
                *(models[-1], batches, LOSSES),
                optimizer=sgd(models[-1]),
                epochs=2,
                threshold=-0.02,
                method=method,
                **{"memory": memory, "floor": 4, **options},
            )
        )
    expected = maps[0]
    assert expected.steps == 24 and max(expected.scores().values()) > 0
    for cmap, model in zip(maps[1:], models[1:], strict=True):
        assert_same_weights(model, models[0])
        assert cmap.steps == 24 and cmap.scores() == expected.scores() and cmap.observed() == expected.observed()
        assert cmap.pair_scores() == expected.pair_scores() and cmap.floor() == expected.floor()


def test_a_graph_is_freed_before_the_next_task_runs():
    class Marker:
        """Lives as long as the node of the graph."""

    model, alive = net(), []

    def seen(module, args, output):
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)
        output.grad_fn.metadata["marker"] = marker = Marker()
        alive.append(weakref.ref(marker))

    model.body.register_forward_hook(seen)
    recon.train(model, [joint(batch) for batch in shared_batches(2)], LOSSES, optimizer=sgd(model), method="pcgrad")
    assert len(alive) == 6


def test_tasks_with_inputs_of_their_own_are_the_sum_of_their_gradients():
    xs = {task: torch.randn(n, 6) for n, task in enumerate(TASKS, start=3)}  # batch sizes of their own
    ys = {task: x.sum(1) for task, x in xs.items()}
    model, by_hand = net(), net()
    recon.train(
        *(model, [{task: (xs[task], ys[task]) for task in TASKS}], LOSSES),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
    )
    sum(mse_loss(by_hand(xs[task])[task], ys[task]) for task in TASKS).backward()
    torch.optim.SGD(by_hand.parameters(), 0.1).step()
    assert_same_weights(model, by_hand)


# accumulate="tasks"


def test_a_task_that_was_met_several_times_counts_with_the_mean_of_its_gradients():
    x, y = shared_batches(1, 24)[0]
    cut = [(x[i : i + 8], {t: v[i : i + 8] for t, v in y.items()}) for i in (0, 8, 16)]
    several = [(cut[0][0], {"a": cut[0][1]["a"], "b": cut[0][1]["b"]}), (cut[1][0], {"a": cut[1][1]["a"]})]
    several += [(cut[2][0], {"a": None}), (cut[2][0], {"c": cut[2][1]["c"]})]
    model, by_hand = net(), net()
    history = recon.train(
        *(model, several, LOSSES), optimizer=torch.optim.SGD(model.parameters(), 0.1), accumulate="tasks"
    )
    loss = (by_hand(x[:16])["a"] - y["a"][:16]).square().mean()  # of two batches of the same size
    loss += mse_loss(by_hand(x[:8])["b"], y["b"][:8]) + mse_loss(by_hand(x[16:])["c"], y["c"][16:])
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), 0.1).step()
    assert_same_weights(model, by_hand)
    assert history.steps == 1
    assert history.epochs[0].losses["a"] == pytest.approx(mse_loss(net()(x[:16])["a"], y["a"][:16]).item())


def test_the_last_group_of_an_epoch_is_a_step_with_what_there_is():
    batches = one_by_one(shared_batches(2))[:-1]  # the second group lacks task c
    model, by_hand = net(), net()
    history = recon.train(model, batches, LOSSES, optimizer=sgd(model), accumulate="tasks")
    optimizer = sgd(by_hand)
    first, (z, others) = shared_batches(2)
    for x, targets in [first, (z, {"a": others["a"], "b": others["b"]})]:
        optimizer.zero_grad()
        sum(mse_loss(by_hand(x)[task], target) for task, target in targets.items()).backward()
        optimizer.step()
    assert history.steps == 2
    assert_same_weights(model, by_hand)


def test_a_task_too_rare_to_be_waited_for():
    batches = [(torch.zeros(1, 6), {"a": torch.zeros(1), "b": torch.zeros(1)})] * 200
    with pytest.raises(UsageError, match=r"150 batches in a row had no target for 'c'.*recon\.joint_loader"):
        recon.train((model := net()), batches, LOSSES, optimizer=sgd(model), accumulate="tasks")


@pytest.mark.parametrize("accumulate", ["all", 0, 1.5, True, None])
def test_accumulate_is_a_number_or_tasks(accumulate):
    with pytest.raises(UsageError, match="accumulate is"):
        recon.train((model := net()), [], LOSSES, optimizer=sgd(model), accumulate=accumulate)


# Nothing pretends.


def test_a_method_that_meets_one_task_at_a_time_says_so(caplog):
    trained(one_by_one(shared_batches(7)), method="stch")
    (record,) = [r for r in caplog.records if "acts between tasks" in r.message]
    assert all(way in record.message for way in ("joint_loader", "Window", "accumulate='tasks'"))


@pytest.mark.parametrize("method", ["joint", "uw", "dwa", "imtl-l"])
def test_what_needs_no_other_task_does_not(caplog, method):
    trained(one_by_one(shared_batches(7)), method=method)
    assert "acts between" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"until_stable": 0.9}, {"every": 3}], ids=["plain", "stable", "every"])
def test_a_profile_in_which_no_pair_meets_stops_after_twenty_steps(tmp_path, options):
    model, path = net(), tmp_path / "profile.checkpoint"
    optimizer, steps = sgd(model), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    with pytest.raises(UsageError, match=r"in the first 20 steps \(a in 7, b in 7, c in 6\)") as error:
        recon.profile(*(model, one_by_one(shared_batches(40)), LOSSES), optimizer=optimizer, checkpoint=path, **options)
    for way in ("joint_loader", "Window", "accumulate='tasks'"):
        error.match(way)
    assert not path.exists()  # going on from there would end there again
    assert steps == [1] * 20


def test_a_short_epoch_of_single_tasks_is_enough_to_tell():
    model = net()
    with pytest.raises(UsageError, match=r"in the first 6 steps \(a in 2, b in 2, c in 2\)"):
        recon.profile(model, one_by_one(shared_batches(2)), LOSSES, optimizer=sgd(model), epochs=5)


def test_a_profile_without_a_shared_layer_stops_early():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

        def forward(self, x):
            return {task: head(x).squeeze(1) for task, head in self.heads.items()}

    model, steps = Apart(), []
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    with pytest.raises(UsageError, match="No layer is shared: in none of 20 steps"):
        recon.profile(model, shared_batches(60), LOSSES, optimizer=optimizer, until_stable=0.9, floor=None)
    assert len(steps) == 20


def test_tasks_that_meet_late_are_profiled():
    model = net()
    batches = one_by_one(shared_batches(6)) + shared_batches(4)
    cmap = recon.profile(model, batches, LOSSES, optimizer=sgd(model), epochs=1)
    assert cmap.steps == 22 and set(cmap.observed()["body.0"].values()) == {4}


# A loss that is None


def test_a_loss_that_is_none_is_an_absent_task():
    whole = shared_batches(4)

    def masked(output, target):
        return None if target.isnan().all() else mse_loss(output, target)

    nan = [(x, {**y, "c": torch.full_like(y["c"], math.nan)} if n % 2 else y) for n, (x, y) in enumerate(whole)]
    left_out = [(x, {"a": y["a"], "b": y["b"]} if n % 2 else y) for n, (x, y) in enumerate(whole)]
    for form in (lambda batch: batch, joint):
        model, expected = net(), net()
        history = recon.train(
            *(model, [form(b) for b in nan], dict.fromkeys(TASKS, masked)), optimizer=sgd(model), method="pcgrad"
        )
        theirs = recon.train(expected, left_out, LOSSES, optimizer=sgd(expected), method="pcgrad")
        assert_same_weights(model, expected)
        assert history.epochs[0].losses == pytest.approx(theirs.epochs[0].losses, rel=1e-12)
    tasks = [recon.Task(task, masked) for task in TASKS]
    ours, theirs = (recon.evaluate(model, data, tasks) for data in (nan, left_out))
    assert ours == theirs


def test_a_task_that_is_absent_throughout_is_told():
    losses = {**LOSSES, "c": lambda output, target: None}
    with pytest.raises(ProblemError, match="No batch of epoch 1 had a target for 'c'"):
        recon.train((model := net()), shared_batches(2), losses, optimizer=sgd(model))
    with pytest.raises(ProblemError, match="No batch had a target for task 'c'"):
        recon.evaluate(model, shared_batches(2), [recon.Task(task, loss) for task, loss in losses.items()])


def test_a_task_that_no_joint_batch_has_is_told_of_in_the_form_of_joint_batches():
    loader = recon.joint_loader({task: [(x, targets[task]) for x, targets in shared_batches(2)] for task in TASKS})
    losses = {**LOSSES, "zzz": LOSSES[TASKS[0]]}
    with pytest.raises(ProblemError, match=r"target for 'zzz'\. The loader yields \{task name: \(inputs, target\)\}"):
        recon.train((model := net()), loader, losses, optimizer=sgd(model))


def test_a_task_that_the_loss_of_the_batch_never_has_is_told():
    def never(outputs, batch):
        return {task: None if task == TASKS[0] else outputs[task].mean() for task in TASKS}

    with pytest.raises(ProblemError, match=rf"your loss gave None for '{TASKS[0]}' in every batch.* out of tasks="):
        recon.train((model := net()), shared_batches(2), never, tasks=TASKS, optimizer=sgd(model))


# Losses of the whole batch


def whole_batch(outputs, batch):
    _, targets = batch
    found = {task: mse_loss(outputs[task], target) for task, target in targets.items() if target is not None}
    return {"b": None, **found}


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_losses_of_the_whole_batch(method):
    whole = shared_batches()
    batches = [*whole[:3], *map(joint, whole[3:]), (whole[0][0], {"a": whole[0][1]["a"], "b": None})]
    expected, _ = trained(batches, method=method)
    model = net()
    recon.train(model, batches, whole_batch, tasks=TASKS, optimizer=sgd(model), epochs=2, method=method)
    assert_same_weights(model, expected)
    maps = []
    for losses, options in ((LOSSES, {}), (whole_batch, {"tasks": TASKS})):
        model = net()
        maps.append(recon.profile(model, batches, losses, optimizer=sgd(model), method=method, **options))
    assert maps[0].scores() == maps[1].scores() and maps[1].tasks == TASKS


def test_a_loss_of_the_whole_batch_may_read_several_outputs_and_any_target():
    def both(outputs, batch):
        _, targets = batch
        return {"a": (outputs["a"] * targets["mask"]).square().mean(), "b": (outputs["a"] - outputs["b"]).abs().mean()}

    model, by_hand = net(), net()
    x, mask = torch.randn(8, 6), torch.rand(8)
    recon.train(
        *(model, [(x, {"mask": mask})], both),
        tasks=("a", "b"),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
    )
    sum(both(by_hand(x), (x, {"mask": mask})).values()).backward()
    torch.optim.SGD(by_hand.parameters(), 0.1).step()
    assert_same_weights(model, by_hand)


@pytest.mark.parametrize(
    ("losses", "tasks", "error", "message"),
    [
        (whole_batch, None, UsageError, "name the tasks"),
        (whole_batch, "abc", UsageError, "name the tasks"),
        (whole_batch, ("a", "a"), UsageError, "name the tasks"),
        (LOSSES, ("a", "b"), UsageError, "Leave tasks out"),
        ([mse_loss], None, UsageError, "losses is a list"),
        ({**LOSSES, "a": 3}, None, UsageError, "loss of task 'a' is 3"),
        (whole_batch, ("a", "b"), ProblemError, "returned one for 'c', which is no task"),
        (lambda outputs, batch: outputs["a"].mean(), TASKS, ProblemError, "but returned Tensor"),
        (lambda outputs, batch: {"a": outputs["a"]}, TASKS, ProblemError, r"'a' must be a scalar.*shape \(8,\)"),
    ],
    ids=["no-names", "a-string", "twice", "other-names", "list", "number", "unknown", "tensor", "vector"],
)
def test_losses_of_another_form(losses, tasks, error, message):
    for run in (recon.train, recon.profile):
        with pytest.raises(error, match=message):
            run((model := net()), shared_batches(2), losses, tasks=tasks, optimizer=sgd(model))


# What is told, recorded, evaluated


def test_the_recorder_writes_every_task_of_a_joint_step(tmp_path):
    path = tmp_path / "steps.jsonl"
    model = net()
    recon.train(
        *(model, [joint(b) for b in shared_batches(2)], LOSSES), optimizer=sgd(model), recorder=recon.Recorder(path)
    )
    steps = [line for line in map(json.loads, path.read_text().splitlines()) if "step" in line]
    assert [list(step["losses"]) for step in steps] == [list(TASKS)] * 2


def test_a_loss_or_gradient_that_is_not_finite_names_its_task():
    batches = [joint(batch) for batch in shared_batches(3)]
    spoilt = copy.deepcopy(batches)
    spoilt[1]["b"][1].fill_(math.nan)
    model, before = net(), {}

    def root(output, target):
        return ((output - output.detach()).abs().sqrt()).sum()  # 0, with an infinite gradient

    with pytest.raises(GradientError, match="loss of task 'b' is nan in step 2 of epoch 1"):
        recon.train(model, spoilt, LOSSES, optimizer=sgd(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GradientError, match="gradient of task 'c' is not finite in step 1 of epoch 1"):
        recon.train(model, batches, {**LOSSES, "c": root}, optimizer=sgd(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_of_both_kinds_and_of_joint_loaders():
    whole, model = shared_batches(5), net()
    tasks = [recon.Task(task, mse_loss) for task in TASKS]
    expected = recon.evaluate(model, whole, tasks)
    for batches in ([joint(batch) for batch in whole], [*whole[:2], *map(joint, whole[2:])], one_by_one(whole)):
        found = recon.evaluate(model, batches, tasks)
        assert {t: m["loss"] for t, m in found.items()} == pytest.approx({t: m["loss"] for t, m in expected.items()})
    lists = {task: [(x, y[task]) for x, y in whole[: n + 2]] for n, task in enumerate(TASKS)}
    alone = {
        task: recon.evaluate(model, one, [recon.Task(task, mse_loss)])[task]
        for task, one in ((t, [(x, {t: y}) for x, y in pairs]) for t, pairs in lists.items())
    }
    for length in ("longest", "shortest", 9):  # every sample counts once, whatever is trained on
        assert recon.evaluate(model, recon.joint_loader(lists, length), tasks) == alone


def test_a_misspelt_task_in_a_joint_batch_is_told(caplog):
    x, y = shared_batches(1)[0]
    with pytest.raises(ProblemError, match="had a target for 'c'"):
        recon.train(
            (model := net()), [{"a": (x, y["a"]), "b": (x, y["b"]), "C": (x, y["c"])}], LOSSES, optimizer=sgd(model)
        )
    assert "no target for 'c', but it has targets for 'C'" in caplog.text


@pytest.mark.parametrize(
    "batch",
    [{"a": torch.zeros(2)}, {"a": (1, 2, 3)}, {"a": recon.inputs(1)}, {3: (torch.zeros(2), 1)}, recon.inputs(1)],
    ids=["tensor", "three", "inputs", "number", "bare"],
)
def test_a_batch_of_another_form(batch):
    with pytest.raises(ProblemError, match=r"A batch.*\(inputs"):
        recon.train((model := net()), [batch], LOSSES, optimizer=sgd(model))


# A problem whose tasks have loaders of their own


def problem(**options):
    def make_loaders(seed):
        lists = {task: [(x, y[task]) for x, y in shared_batches(4)] for task in TASKS}
        return recon.joint_loader(lists), recon.joint_loader(lists)

    tasks = [recon.Task(task, mse_loss) for task in TASKS]
    return recon.Problem(
        **{"name": "three", "tasks": tasks, "make_model": Net, "make_loaders": make_loaders, **options}
    )


def test_example_inputs_and_steps_of_a_problem_of_joint_batches():
    three = problem()
    assert torch.equal(example_inputs(three, 0), shared_batches(1)[0][0])
    loader, _ = three.make_loaders(0)
    parts = first_batch(three, loader, torch.device("cpu"))
    for tasks in ((), ("b",)):
        step = TrainingStep(three, net(), parts, "pcgrad", tasks)
        step()
        assert any(p.grad is not None for p in step.model.heads["b"].parameters())
        assert all((p.grad is None) == bool(tasks) for p in step.model.heads["a"].parameters())


def test_a_first_batch_of_one_task_is_joined_by_those_of_the_others():
    three = problem(make_loaders=lambda seed: (one_by_one(shared_batches(2)), []))
    parts = first_batch(three, three.make_loaders(0)[0], torch.device("cpu"))
    assert [list(part.targets) for part in parts] == [["a"], ["b"], ["c"]]
