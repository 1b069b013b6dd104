import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import recon
from recon.errors import CheckpointError, GradientError, ProblemError, UsageError
from recon.profiling.profiler import Profiler
from recon.profiling.tally import Tally
from tests.methods.test_jacobian import TwoHeads, autograd_cosines, losses_of

TASKS = ("a", "b")
LOSSES = {
    "a": lambda out, target: (out - target).square().sum(),
    "b": lambda out, target: (out - target).square().mean(),
}


def batches(count, seed=0, **without):
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        x = torch.randn(8, 1, 6, 6, generator=generator)
        targets = {"a": torch.randn(8, 3, generator=generator), "b": torch.randn(8, 2, generator=generator)}
        yield x, {task: target for task, target in targets.items() if step not in without.get(task, ())}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads()


def oracle_steps(model, loader):
    """The cosines of each step of joint training, by full backward passes in the training itself."""
    optimizer = sgd(model)
    steps = []
    for x, targets in loader:
        out = model(x)
        losses = {task: LOSSES[task](out[task], targets[task]) for task in targets}
        cosines = autograd_cosines(model, losses) if len(losses) > 1 else {}
        optimizer.zero_grad()
        out = model(x)
        sum(LOSSES[task](out[task], targets[task]) for task in targets).backward()
        optimizer.step()
        steps.append(cosines)
    return steps


@pytest.mark.parametrize("threshold", [-0.1, -0.02, 0.0, -0.5])
def test_scores_count_cosines_strictly_below_the_threshold(model, threshold):
    model = model.double().eval()
    wide = [(x.double(), {t: y.double() for t, y in targets.items()}) for x, targets in batches(40)]
    steps = oracle_steps(copy.deepcopy(model), wide)
    profiler = Profiler(model, threshold)
    optimizer = sgd(model)
    for x, targets in wide:
        out = model(x)
        optimizer.zero_grad()
        profiler.backward({task: LOSSES[task](out[task], targets[task]) for task in TASKS})
        optimizer.step()
    cmap = profiler.conflict_map()
    assert [layer.name for layer in cmap.layers] == ["conv", "norm"]
    for other in (threshold, -0.9, -0.3, 0.0):
        expected = {name: sum(step[name] < other for step in steps) for name in ("conv", "norm")}
        assert cmap.scores(other) == expected
    assert sum(cmap.scores().values()) > 0 or threshold == -0.5
    for layer in cmap.layers:
        by_quarter = [sum(step[layer.name] < threshold for step in steps[i : i + 10]) for i in range(0, 40, 10)]
        assert layer.conflicts[:, 0].tolist() == by_quarter
        assert layer.observed[:, 0].tolist() == [10] * 4


def test_a_cosine_on_the_threshold_is_no_conflict():
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = weight
    # cos = -3/5 exactly: (1, 0, ...) and (-3, 4, 0, ...)
    first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    second = torch.tensor([-3.0, 4, 0, 0, 0], dtype=torch.float64)
    profiler = Profiler(model, threshold=-0.6)
    profiler.backward({"a": weight @ first, "b": weight @ second})
    cmap = profiler.conflict_map()
    assert cmap.scores(-0.6) == {"layer": 0} and cmap.scores(-0.59) == {"layer": 1}
    assert cmap.layers[0].conflicts.sum() == 0


def test_gradients_and_training_equal_plain_joint_training(model):
    plain = copy.deepcopy(model)
    profiler = Profiler(model)
    for x, targets in batches(1):
        out = model(x)
        profiler.backward({task: LOSSES[task](out[task], targets[task]) for task in TASKS})
        out = plain(x)
        sum(LOSSES[task](out[task], targets[task]) for task in TASKS).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_profiled_joint_training_in_float64_follows_the_plain_one(model):
    model = model.double()
    plain = copy.deepcopy(model)
    wide = [(x.double(), {t: y.double() for t, y in targets.items()}) for x, targets in batches(20)]
    recon.profile(model, wide, LOSSES, optimizer=sgd(model), epochs=2)
    recon.train(plain, wide, LOSSES, optimizer=sgd(plain), epochs=2)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "cagrad"])
def test_profiling_leaves_a_gradient_method_bit_identical(model, method):
    plain = copy.deepcopy(model)
    recon.profile(model, list(batches(10)), LOSSES, optimizer=sgd(model), epochs=1, method=method)
    recon.train(plain, list(batches(10)), LOSSES, optimizer=sgd(plain), epochs=1, method=method)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_backward_accumulates_like_autograd(model):
    profiler = Profiler(model.eval())
    for x, _ in batches(1):
        profiler.backward(losses_of(model, x))
        once = [p.grad.clone() for p in model.parameters()]
        profiler.backward(losses_of(model, x))
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_the_same_seed_gives_the_same_map():
    maps = []
    for _ in range(2):
        torch.manual_seed(3)
        model = TwoHeads()
        maps.append(recon.profile(model, list(batches(30)), LOSSES, optimizer=sgd(model), epochs=2))
    for one, other in zip(maps[0].layers, maps[1].layers, strict=True):
        assert np.array_equal(one.histogram, other.histogram) and np.array_equal(one.conflicts, other.conflicts)


def test_a_missing_task_contributes_no_pair(model):
    cmap = recon.profile(model, list(batches(20, a={3, 4}, b={0, 9, 19})), LOSSES, optimizer=sgd(model), epochs=1)
    assert cmap.steps == 20
    assert all(layer.observed.sum() == 15 for layer in cmap.layers)
    assert cmap.tasks == TASKS


def test_tasks_found_late_and_pairs_of_three_tasks(model):
    profiler = Profiler(model.eval())
    x, _ = next(batches(1))
    for _ in range(2):
        profiler.backward(losses_of(model, x))
    third = model(x)["b"].neg().sum()
    profiler.backward({"c": third, **losses_of(model, x)})
    cmap = profiler.conflict_map()
    assert cmap.tasks == ("a", "b", "c") and cmap.pairs == list(combinations("abc", 2))
    assert {layer.name: layer.observed.sum(axis=0).tolist() for layer in cmap.layers} == {
        "conv": [3, 1, 1],
        "norm": [3, 1, 1],
        "heads.b": [0, 0, 1],
    }


def test_steps_that_are_not_finite_are_skipped_and_counted(model):
    profiler = Profiler(model.eval())
    x, _ = next(batches(1))
    for scale in (1.0, float("inf"), float("nan"), 1.0):
        losses = losses_of(model, x)
        profiler.backward({"a": losses["a"] * scale, "b": losses["b"]})
    cmap = profiler.conflict_map()
    assert (cmap.steps, cmap.skipped) == (4, 2)
    assert all(layer.histogram.sum() == layer.observed.sum() == 2 for layer in cmap.layers)


def test_a_zero_gradient_has_no_cosine(model):
    profiler = Profiler(model.eval())
    x, _ = next(batches(1))
    profiler.backward(losses_of(model, x))
    profiler.backward({"a": model(x)["a"].sum() * 0, "b": model(x)["b"].sum()})
    assert all(layer.observed.sum() == 1 for layer in profiler.conflict_map().layers)


@pytest.mark.parametrize("steps", [1, 3, 5, 64, 65, 131, 1000])
def test_quarters_split_the_training_evenly(steps):
    layer = nn.Linear(2, 1)
    model = nn.Sequential(layer)
    profiler = Profiler(model)
    for _ in range(steps):
        out = layer(torch.ones(1, 2)).sum()
        profiler.backward({"a": out, "b": -out})
    cmap = profiler.conflict_map()
    assert sum(cmap.stage_steps) == steps
    assert max(abs(n - steps / 4) for n in cmap.stage_steps) <= max(1, steps / 32)
    assert cmap.scores() == {"0": steps}
    assert cmap.layers[0].conflicts[:, 0].tolist() == list(cmap.stage_steps)


def test_a_block_of_steps_belongs_to_the_quarter_in_which_its_middle_lies():
    """No quarter ends farther than half a block from where it should."""
    gramian = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    tally = Tally(1, -0.1, torch.device("cpu"))
    block = 1
    for steps in range(1, 400):
        tally.add([0], [0, 1], gramian)
        block *= 2 if steps > 64 * block else 1
        conflicts, _, stage_steps = tally.by_stage(2)
        assert conflicts[:, 0, 0, 1].tolist() == stage_steps
        for end, quarter in zip(np.cumsum(stage_steps), (1, 2, 3, 4), strict=True):
            assert abs(end - steps * quarter / 4) <= block / 2, steps


def test_a_tally_that_loads_a_state_forgets_what_it_had_counted():
    agree, conflict = (torch.tensor([[[1.0, c], [c, 1.0]]], dtype=torch.float64) for c in (1.0, -1.0))
    saved, other = (Tally(1, -0.1, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        saved.add([0], [0, 1], agree)
    other.add([0], [0, 1], conflict)
    other.load_state_dict(saved.state_dict())
    other.add([0], [0, 1], agree)
    conflicts, observed, _ = other.by_stage(2)
    assert (other.steps, int(conflicts.sum()), int(observed.sum())) == (4, 0, 4)
    assert other.histogram.sum() == 4


def test_tied_and_reused_layers_are_scored_once_on_the_full_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            h = torch.tanh(self.second(torch.tanh(self.first(self.first(x)))))
            return {"a": h[:, :2], "b": h[:, 2:]}

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(8, 4)
    profiler = Profiler(model)
    out = model(x)
    u, v = (torch.autograd.grad(out[t].square().sum(), model.first.weight, retain_graph=True)[0] for t in "ab")
    profiler.backward({t: out[t].square().sum() for t in "ab"})
    cmap = profiler.conflict_map()
    assert [layer.name for layer in cmap.layers] == ["first"]
    cosine = torch.nn.functional.cosine_similarity(u.flatten().double(), v.flatten().double(), dim=0)
    assert cmap.layers[0].histogram[int(torch.floor((cosine + 1) * 100))] == 1


def test_all_that_one_task_alone_reaches_counts_in_the_norm_of_a_shared_layer():
    class Scaled(nn.Module):
        """Task b leaves out two of its three parameters."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.scale = (nn.Parameter(torch.randn(4)) for _ in range(3))

        def forward(self, x):
            return {"a": self.scale * (self.weight * x + self.bias), "b": self.weight * x}

    torch.manual_seed(0)
    model = nn.ModuleDict({"body": Scaled()}).double()
    profiler, expected = Profiler(model), np.zeros(200)
    for x in torch.randn(6, 8, 4).double():
        out = model["body"](x)
        losses = {"a": out["a"].square().sum(), "b": out["b"].exp().sum()}
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        u, v = (torch.cat(torch.autograd.grad(loss, list(model.parameters()), **options)) for loss in losses.values())
        expected[int(torch.floor((u @ v / (u.norm() * v.norm()) + 1) * 100))] += 1
        profiler.backward(losses)
    cmap = profiler.conflict_map()
    assert [layer.name for layer in cmap.layers] == ["body"]
    assert cmap.layers[0].histogram.tolist() == expected.tolist()


def test_nothing_profiled_yet(model):
    with pytest.raises(UsageError, match="Nothing was profiled"):
        Profiler(model).conflict_map()


def test_no_shared_layer(model):
    with pytest.raises(UsageError, match=r"No two tasks have met in the first 4 steps \(a in 2, b in 2\)"):
        recon.profile(model, list(batches(4, a={0, 1}, b={2, 3})), LOSSES, optimizer=sgd(model), epochs=1)


def test_every_step_non_finite(model):
    profiler = Profiler(model)
    x, _ = next(batches(1))
    profiler.backward({task: loss * float("nan") for task, loss in losses_of(model, x).items()})
    with pytest.raises(GradientError, match="all 1 steps"):
        profiler.conflict_map()


@pytest.mark.parametrize("threshold", [0.1, -1.0, -0.105])
def test_a_threshold_off_the_grid_is_refused_before_training(model, threshold):
    with pytest.raises(UsageError, match=r"multiple of 0\.01"):
        Profiler(model, threshold)


def test_a_loss_that_is_nan_stops_the_run_before_the_weights_are_touched(model):
    before = copy.deepcopy(model.state_dict())
    losses = LOSSES | {"b": lambda out, target: out.sum() * float("nan")}
    with pytest.raises(GradientError, match=r"loss of task 'b' is nan in step 1 of epoch 1"):
        recon.profile(model, list(batches(3)), losses, optimizer=sgd(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_task_the_loader_never_labels(model):
    with pytest.raises(ProblemError, match="No batch of epoch 1 had a target for 'c'"):
        recon.profile(model, list(batches(3)), LOSSES | {"c": LOSSES["a"]}, optimizer=sgd(model))


def test_how_the_map_was_made_is_kept(model):
    cmap = recon.profile(model, list(batches(3)), LOSSES, optimizer=sgd(model), epochs=2, made_by={"problem": "toy"})
    assert cmap.made_by["problem"] == "toy" and cmap.made_by["optimizer"] == "SGD"
    assert cmap.made_by["learning_rate"] == 0.05 and cmap.made_by["epochs"] == 2 and cmap.made_by["seconds"] > 0


def steps_of(model, count, seed=0):
    """Losses of one step after the other; the model trains in between."""
    optimizer, dtype = sgd(model), next(model.parameters()).dtype
    for x, targets in batches(count, seed):
        out = model(x.to(dtype))
        optimizer.zero_grad()
        yield {task: LOSSES[task](out[task], target.to(dtype)) for task, target in targets.items()}
        optimizer.step()


@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_nth_step_is_profiled_and_the_others_are_plain(model, every):
    model = model.double().eval()
    twin = copy.deepcopy(model)
    profiler, each = Profiler(model, every=every), []
    for ours, theirs in zip(steps_of(model, 20), steps_of(twin, 20), strict=True):
        profiler.backward(ours)
        each.append(Profiler(twin))
        each[-1].backward(theirs)
    cmap, expected = profiler.conflict_map(), [one.conflict_map() for one in each[::every]]
    assert cmap.steps == profiler.steps == len(expected) == -(-20 // every)
    for number, layer in enumerate(cmap.layers):
        assert layer.histogram.tolist() == sum(one.layers[number].histogram for one in expected).tolist()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_series_adds_up_and_keeps_the_order(model):
    profiler = Profiler(model)
    single = []
    for losses in steps_of(model, 30):
        before = {} if profiler.steps == 0 else profiler.conflict_map().scores()
        profiler.backward(losses)
        after = profiler.conflict_map().scores()
        single.append([after[name] - before.get(name, 0) for name in after])
    cmap = profiler.conflict_map()
    assert cmap.bin_steps == 1
    assert np.array_equal(np.stack([layer.series for layer in cmap.layers], axis=1), np.array(single))


@pytest.mark.parametrize("steps, bin_steps, bins", [(512, 1, 512), (513, 2, 257), (1100, 4, 275)])
def test_a_long_series_is_kept_in_wider_bins(steps, bin_steps, bins):
    layer = nn.Linear(2, 1)
    profiler = Profiler(nn.Sequential(layer))
    for step in range(steps):
        out = layer(torch.ones(1, 2)).sum()
        profiler.backward({"a": out, "b": -out if step % 2 else out})
    cmap = profiler.conflict_map()
    series = cmap.layers[0].series
    assert (cmap.bin_steps, len(series)) == (bin_steps, bins)
    assert (
        series.sum() == steps // 2 and (series[:-1] == (bin_steps // 2 if bin_steps > 1 else [0, 1] * 255 + [0])).all()
    )


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"memory": "sketch"}, {"until_stable": 0.9, "top_k": 1}])
def test_a_saved_state_goes_on_to_the_same_map(model, tmp_path, options):
    twin = copy.deepcopy(model)
    whole, first = Profiler(model, tasks=TASKS, **options), Profiler(twin, tasks=TASKS, **options)
    second = Profiler(twin, tasks=TASKS, **options)
    for losses in steps_of(model, 100):
        whole.backward(losses)
        if "top_k" in options:
            whole.is_stable()
    for step, losses in enumerate(steps_of(twin, 100)):
        if step == 63:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        (first if step < 63 else second).backward(losses)
        if "top_k" in options:
            (first if step < 63 else second).is_stable()
    whole.conflict_map().save(tmp_path / "whole.json")
    second.conflict_map().save(tmp_path / "second.json")
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "second.json").read_text()
    assert second.state_dict()["stable"] == whole.state_dict()["stable"]


@pytest.mark.parametrize("other", [{"threshold": -0.2}, {"every": 2}, {"memory": "sketch"}])
def test_the_state_of_another_profiler_is_refused(model, other):
    with pytest.raises(CheckpointError, match=f"other {next(iter(other))}"):
        Profiler(model).load_state_dict(Profiler(model, **other).state_dict())
    with pytest.raises(CheckpointError, match="other layers"):
        Profiler(model).load_state_dict(Profiler(nn.Linear(2, 2)).state_dict())


def test_a_ranking_becomes_stable():
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    model = nn.Sequential(first, second)
    profiler = Profiler(model, until_stable=0.9, top_k=1)
    answers = []
    for _ in range(60):
        one, two = first(torch.ones(1, 2)).sum(), second(torch.ones(1, 2)).sum()
        profiler.backward({"a": one + two, "b": one - two})  # the second layer always conflicts, the first never
        answers.append(profiler.is_stable(planned=1000))
    assert not any(answers[:49]) and answers[49]
    assert profiler.conflict_map().ranking()[:1] == ["1"]


def test_profile_stops_when_the_ranking_is_stable():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return {"a": self.first(x) + self.second(x), "b": self.first(x) - self.second(x)}

    torch.manual_seed(0)
    model = Two()
    loader = [(torch.ones(4, 3), {"a": torch.zeros(4, 1), "b": torch.zeros(4, 1)})] * 40
    losses = dict.fromkeys(TASKS, lambda out, target: out.sum())
    cmap = recon.profile(model, loader, losses, optimizer=sgd(model), epochs=5, until_stable=0.9, top_k=1)
    assert cmap.steps == 50 and cmap.ranking() == ["second", "first"]
    assert cmap.made_by["until_stable"] == 0.9 and cmap.made_by["epochs"] == 5


def test_a_profiler_without_until_stable_cannot_tell(model):
    profiler = Profiler(model)
    for losses in steps_of(model, 3):
        profiler.backward(losses)
    with pytest.raises(UsageError, match="make the profiler with until_stable"):
        profiler.is_stable()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_the_layers_of_a_wrapped_model_have_its_own_names(model, wrap):
    assert [layer.name for layer in Profiler(wrap(model)).layers] == [layer.name for layer in Profiler(model).layers]


def test_bad_options(model):
    for every in (0, -1, 1.5):
        with pytest.raises(UsageError, match="whole number of at least 1"):
            Profiler(model, every=every)
    with pytest.raises(UsageError, match="the model has 5 layers"):
        Profiler(model, top_k=6)
    with pytest.raises(UsageError, match=r"Pass the torch\.nn\.Module"):
        Profiler(3)
    with pytest.raises(UsageError, match="Pass a dict"):
        Profiler(model).backward([torch.ones(())])
    with pytest.raises(UsageError, match="losses is empty"):
        Profiler(model).backward({})
    with pytest.raises(CheckpointError, match="not the saved state of a profiler"):
        Profiler(model).load_state_dict({})
    with pytest.raises(UsageError, match=r"Give a share in \(0, 1\]"):
        Profiler(model, until_stable=1.5)
    with pytest.raises(UsageError, match="at least 1 layer"):
        Profiler(model, until_stable=0.9, top_k=0)
