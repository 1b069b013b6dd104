"""profile(floor=): the second batch is looked at ahead of time, and the training is none the wiser."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import recon
from recon.errors import UsageError
from tests.training.test_checkpoints import LOADERS, Training, assert_same, control_c, crashing_losses, seed

LOSSES = {"a": mse_loss, "b": nn.functional.l1_loss}


class Net(nn.Module):
    """Notes the random numbers and the inputs of each forward; its norm has running statistics."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.mix = nn.Linear(8, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})
        self.seen = []

    def forward(self, x):
        Net.log.append((torch.rand(()).item(), x.sum().item()))
        x.div_(2)  # a forward may write into its inputs
        hidden = self.drop(torch.tanh(self.norm(self.stem(x))))
        hidden = torch.tanh(self.mix(hidden))
        return {task: head(hidden).squeeze(1) for task, head in self.heads.items()}


@pytest.fixture(autouse=True)
def log():
    Net.log = []
    return Net.log


def batches(count, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 6, generator=draw, dtype=dtype)
        yield x, {"a": x.sum(1) + torch.randn(8, generator=draw, dtype=dtype), "b": x[:, 0].clone()}


class Loader:
    """New batches in each pass, as a data loader makes them."""

    def __init__(self, count, **options):
        self.count, self.options = count, options

    def __len__(self):
        return self.count

    def __iter__(self):
        return batches(self.count, **self.options)


def train(floor, loader, **options):
    torch.manual_seed(0)
    model = Net()
    cmap = recon.profile(
        model, loader, LOSSES, optimizer=torch.optim.AdamW(model.parameters(), 0.01), floor=floor, **options
    )
    return model, cmap


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_the_training_is_the_same_to_the_last_bit(log, memory):
    plain, without = train(None, Loader(7), memory=memory)
    seen = list(log)
    log.clear()
    floored, cmap = train(2, Loader(7), memory=memory)
    assert cmap.has_floor
    assert not without.has_floor
    for name, value in plain.state_dict().items():
        assert torch.equal(value, floored.state_dict()[name]), name
    assert cmap.scores() == without.scores()
    assert [one for one in log if one in seen] == seen  # the same random numbers and inputs, in order
    others = [one for one in log if one not in seen]
    assert len(others) == len(log) - len(seen) > 5
    # The second batch is the next step's, run on other random numbers.
    assert {total for _, total in others} <= {total for _, total in seen}
    assert not {number for number, _ in others} & {number for number, _ in seen}


@pytest.mark.parametrize("loader", ["recon's", "shuffle", "two workers", "the sampler's generator", "a list"])
def test_the_order_of_the_data_is_the_same_with_any_loader(loader):
    class Steady(nn.Module):
        """No random numbers: those of a loader's transforms then come in the same order."""

        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
            self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

        def forward(self, x):
            hidden = torch.tanh(self.norm(self.stem(x)))
            return {task: head(hidden).squeeze(1) for task, head in self.heads.items()}

    ends = []
    for floor in (None, 3):
        seed(1)
        model = Steady()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        recon.profile(model, LOADERS[loader](), LOSSES, optimizer=optimizer, floor=floor, epochs=2)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def own_conflicts(model, first, second, threshold=-0.1):
    """{layer: {task: whether it conflicts with itself}}, from autograd in float64."""
    found = {}
    for x, targets in (first, second):
        out = model(x.clone())
        for task, loss in LOSSES.items():
            model.zero_grad()
            loss(out[task], targets[task]).backward(retain_graph=True)
            for name in ("stem", "norm", "mix"):
                vector = torch.cat([p.grad.flatten() for p in getattr(model, name).parameters()])
                found.setdefault((name, task), []).append(vector)
    model.zero_grad()
    return {key: float(u @ v / (u.norm() * v.norm())) < threshold for key, (u, v) in found.items()}


def test_the_floor_is_that_of_each_batch_and_the_next_at_the_same_weights():
    def make():
        torch.manual_seed(0)
        model = Net().double()
        model.drop = nn.Identity()
        return model

    epochs, count, every = 3, 8, 3
    twin, seconds = make(), list(batches(count, dtype=torch.float64))
    optimizer = torch.optim.SGD(twin.parameters(), 0.05)
    floors, step, due = [], 0, 0
    for _ in range(epochs):
        for number, (x, targets) in enumerate(seconds):
            if step >= due and number + 1 < count:  # no look into the next epoch: the floor stays due
                floors.append(own_conflicts(copy.deepcopy(twin), seconds[number], seconds[number + 1]))
                due = step + every
            optimizer.zero_grad()
            out = twin(x.clone())
            sum(loss(out[task], targets[task]) for task, loss in LOSSES.items()).backward()
            optimizer.step()
            step += 1
    model = make()
    cmap = recon.profile(
        model,
        Loader(count, dtype=torch.float64),
        LOSSES,
        optimizer=torch.optim.SGD(model.parameters(), 0.05),
        epochs=epochs,
        floor=every,
    )
    assert cmap.made_by["floor_every"] == every
    by_name = {layer.name: layer for layer in cmap.layers}
    at = cmap.thresholds.index(-0.1)
    for name in ("stem", "norm", "mix"):
        floor = by_name[name].floor
        assert floor.observed.tolist() == [len(floors)] * 2
        assert floor.across_observed.tolist() == [2 * len(floors)]
        assert floor.conflicts[at].tolist() == [sum(one[name, task] for one in floors) for task in LOSSES]
    assert sum(value for one in floors for value in one.values()) > 0


@pytest.mark.parametrize(
    ("count", "every", "epochs", "taken"),
    # Each 12th: steps 1, 13 and 25; of the steps 1, 3, 5..., the third of an epoch's three has no next batch.
    [(30, "auto", 1, 3), (3, 2, 2, 2), (1, 2, 5, 0)],
    ids=["each 12th", "the last of an epoch", "one batch an epoch"],
)
def test_how_many_floors_are_taken(count, every, epochs, taken):
    _, cmap = train(every, Loader(count), epochs=epochs)
    assert cmap.has_floor == (taken > 0)
    if taken:
        assert {layer.floor.observed[0] for layer in cmap.layers} == {taken}


def test_profiled_steps_are_what_counts():
    _, cmap = train(2, Loader(24), every=3, epochs=1)
    assert cmap.steps == 8
    assert {layer.floor.observed[0] for layer in cmap.layers} == {4}


def test_accumulated_batches_and_autocast_take_floors():
    ends, maps = [], []
    for floor in (None, 2):
        torch.manual_seed(0)
        model = Net()
        profiler = recon.Profiler(model, tasks=tuple(LOSSES), floor=floor)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        recon.train(model, Loader(7), LOSSES, optimizer=optimizer, accumulate=3, amp="bf16", profiler=profiler)
        ends.append(model.state_dict())
        maps.append(profiler.conflict_map())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    # Before the steps of batches 1 to 3 and 4 to 6: each batch is a profiled step; batch 7 has no next one.
    assert {layer.floor.observed[0] for layer in maps[1].layers} == {2}


class Rotating:
    """Batches that lack a target each in turn, and some that have one alone."""

    def __init__(self, pattern):
        self.pattern = pattern

    def __iter__(self):
        for (x, targets), tasks in zip(batches(len(self.pattern)), self.pattern, strict=True):
            yield x, {task: targets[task] for task in tasks}


@pytest.mark.parametrize(
    ("pattern", "observed"),
    [
        (["ab", "a", "ab", "b", "ab", "ab"], [1, 0]),  # floor at the first step (a), at the third (b), ...
        (["ab", "", "ab", "ab"], [1, 1]),  # the first step has no second batch with targets; the third has
        (["a", "b", "a", "b", "ab", "ab"], [1, 1]),  # a step of one task alone has no shared layer
    ],
)
def test_batches_that_lack_targets(pattern, observed):
    _, cmap = train(100, Rotating(pattern), epochs=1)
    assert {tuple(layer.floor.observed) for layer in cmap.layers} == {tuple(observed)}


@pytest.mark.parametrize(
    ("pattern", "observed"),
    [
        # Only the loss of the whole batch knows: nothing in the second batch; nothing in the first; nothing in common.
        (["ab", "", "ab", "ab"], [1, 1]),
        (["", "ab", "ab", "ab"], [1, 1]),
        (["ab", "", "a", "b", "ab", "ab"], [1, 1]),
    ],
)
def test_losses_of_whole_batches_that_turn_out_to_be_absent(pattern, observed):
    def losses(outputs, batch):
        return {task: LOSSES[task](outputs[task], target) for task, target in batch.targets["all"].items()}

    loader = [(x, {"all": targets}) for x, targets in Rotating(pattern)]
    torch.manual_seed(0)
    model = Net()
    cmap = recon.profile(
        model,
        loader,
        losses,
        tasks=("a", "b"),
        optimizer=torch.optim.AdamW(model.parameters(), 0.01),
        floor=100,
        epochs=1,
    )
    assert {tuple(layer.floor.observed) for layer in cmap.layers} == {tuple(observed)}


@pytest.mark.parametrize("accumulate", [1, "tasks"])
def test_tasks_with_batches_of_their_own_take_floors(accumulate):
    """Each joint step is followed by another one; or by as many batches of one task as it takes to see both."""

    def one_by_one():
        for x, targets in batches(8):
            if accumulate == "tasks":
                yield from ((x, {task: target}) for task, target in targets.items())
            else:
                yield {task: (x.clone(), target) for task, target in targets.items()}

    ends = []
    for floor in (None, 3):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        loader = list(one_by_one())
        cmap = recon.profile(model, loader, LOSSES, optimizer=optimizer, floor=floor, epochs=1, accumulate=accumulate)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert cmap.steps == 8
    assert {tuple(layer.floor.observed) for layer in cmap.layers} == {(3, 3)}  # steps 1, 4 and 7


@pytest.mark.parametrize("floor", [0, 1, -3, 2.5, "often", True])
def test_a_floor_that_is_no_number_of_steps_is_refused(floor):
    with pytest.raises(UsageError, match=r"floor is .*Give 'auto', None, or a whole number n of at least 2"):
        train(floor, Loader(2))


@pytest.mark.parametrize("loader", ["recon's with a random transform", "shuffle", "two workers", "its own state"])
def test_a_profile_with_floors_goes_on_after_a_crash(tmp_path, caplog, loader):
    caplog.set_level("WARNING")
    training = Training(tmp_path / "run.checkpoint", loader, floor=2)
    whole = training.run()
    assert whole[0].has_floor
    assert_same(training.in_pieces([4, 5, 6, 3]), whole, tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("loader", ["recon's with a random transform", "its own state"])
@pytest.mark.parametrize("calls", [[1], [2], [3], [7, 5, 1]], ids=str)
def test_control_c_waits_for_the_batch_that_was_looked_at(tmp_path, loader, calls):
    training = Training(tmp_path / "run.checkpoint", loader, floor=2)
    whole = training.run()
    for count in calls:
        with pytest.raises(KeyboardInterrupt):
            training.resume(crashing_losses(count, control_c), checkpoint_seconds=float("inf"))
    assert_same(training.resume(), whole, tmp_path)


def test_a_loader_of_worker_processes_is_looked_at_ahead():
    data = [(x[0], {task: target[0] for task, target in targets.items()}) for x, targets in batches(64)]
    ends = []
    for floor in (None, 2):
        torch.manual_seed(1)
        model = Net()
        loader = DataLoader(data, 8, shuffle=True, num_workers=1)
        recon.profile(model, loader, LOSSES, optimizer=torch.optim.SGD(model.parameters(), 0.05), floor=floor, epochs=1)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
