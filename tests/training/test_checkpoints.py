import dataclasses
import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

import recon
from recon.errors import CheckpointError, GradientError, LoaderError, UsageError
from recon.problems.loading import TensorBatches, in_order, shuffled
from recon_cli.main import main
from tests.ranks import PATIENCE
from tests.training.child import in_child

LOSSES = {"a": mse_loss, "b": nn.functional.l1_loss}


class Net(nn.Module):
    """What makes a resume hard: running statistics, dropout, a layer that one task alone trains."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)
        self.mix = nn.Linear(width, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)).relu())
        x = self.drop(self.mix(x).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class Noisy(Dataset):
    """Samples changed at random, from every source of chance that a transform may use; some labels are missing."""

    def __init__(self, own=False):
        self.x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        self.own = np.random.default_rng(5) if own else None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index] + 0.1 * torch.randn(6)
        x = x * random.uniform(0.9, 1.1) + float((self.own or np.random).normal()) * 0.1
        return x, {"a": self.x[index].sum(), "b": self.x[index, 0]}


class Stream(IterableDataset):
    def __iter__(self):
        data = Noisy()
        return (data[int(i)] for i in torch.randperm(48))


class Sparse:
    """Any iterable will do; here one whose batches lack labels, and one without any."""

    def __iter__(self):
        for number, (x, targets) in enumerate(shuffled(TensorBatches(*tensors()), 8, seed=int(torch.randint(99, ())))):
            yield (
                x,
                {task: target for task, target in targets.items() if number not in {"a": (1, 4), "b": (2, 4)}[task]},
            )


class Stateful:
    """A loader that counts its passes, and so knows its place best itself."""

    def __init__(self):
        self.epoch, self.place, self.resumed = 0, 0, False

    def __iter__(self):
        if not self.resumed:
            self.place = 0
        self.resumed = False
        order = torch.randperm(6, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        x, targets = tensors()
        while self.place < len(order):
            i = slice(8 * order[self.place], 8 * order[self.place] + 8)
            self.place += 1
            yield x[i], {task: target[i] for task, target in targets.items()}
        self.epoch += 1
        self.place = 0

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.place, self.resumed = state["epoch"], state["place"], True


class OneTaskABatch:
    """Each batch has the target of one task, drawn at random."""

    def __init__(self):
        self.loader = DataLoader(Noisy(), 4, shuffle=True)

    def __iter__(self):
        draw = random.Random(int(torch.randint(99, ())))  # its own, so that it finds its place
        for x, targets in self.loader:
            task = draw.choice("ab")
            yield x, {task: targets[task]}


def tensors():
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    return x, {"a": x.sum(1), "b": x[:, 0]}


def generator():
    return torch.Generator().manual_seed(3)


LOADERS = {
    "recon's": lambda: shuffled(TensorBatches(*tensors()), 8, seed=2),
    "recon's with a random transform": lambda: shuffled(
        TensorBatches(*tensors(), transform=lambda x: x + torch.randn_like(x)), 8, seed=2
    ),
    "shuffle": lambda: DataLoader(Noisy(), 8, shuffle=True),
    "two workers": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2),
    "two workers, generator": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2, generator=generator()),
    "the sampler's generator": lambda: DataLoader(Noisy(), 8, sampler=RandomSampler(Noisy(), generator=generator())),
    "replacement": lambda: DataLoader(Noisy(), 8, sampler=RandomSampler(Noisy(), True, 48)),
    "weighted": lambda: DataLoader(Noisy(), 8, sampler=WeightedRandomSampler(torch.arange(1.0, 49), 48)),
    "a generator in the data": lambda: DataLoader(Subset(Noisy(own=True), range(48)), 8, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), 8),
    "missing labels": Sparse,
    "a list": lambda: list(in_order(TensorBatches(*tensors()), 8)),
    "its own state": Stateful,
    "joint": lambda: recon.joint_loader(
        {"a": DataLoader(Noisy(), 8, shuffle=True), "b": DataLoader(Noisy(own=True), 12, shuffle=True)}
    ),
    "joint, with generators and workers": lambda: recon.joint_loader(
        {
            "a": DataLoader(Noisy(), 16, shuffle=True, num_workers=1, generator=generator()),
            "b": DataLoader(Stream(), 24),
        },
        length=6,
    ),
    "joint, one with its own state": lambda: recon.joint_loader(
        {"a": Stateful(), "b": LOADERS["recon's with a random transform"]()}, length=6
    ),
    "joint, in the middle of its own state": lambda: recon.joint_loader({"a": Stateful(), "b": Stateful()}, length=4),
}

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}

SCHEDULERS = {
    "none": None,
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=18),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 9]),
        ],
        [4],
    ),
}


class CrashError(Exception):
    """The machine is switched off."""


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def crashing_losses(at, how):
    """The losses; after `at` steps one of them comes to grief."""
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == at:
            how()
        return mse_loss(output, target)

    return {**LOSSES, "a": loss}


def crash():
    raise CrashError


def control_c():
    signal.raise_signal(signal.SIGINT)


class Training:
    """One training that can be run at a go, or in pieces, each as in a process of its own."""

    def __init__(self, path, loader="shuffle", optimizer="adam", scheduler="none", method="joint", **options):
        self.path = path
        self.loader, self.method = LOADERS[loader], method
        self.optimizer, self.scheduler = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
        self.options = {"epochs": 3, "floor": None, **options}

    def run(self, losses=LOSSES, chance=0, **options):
        """Train; gives the map, and the weights."""
        seed(chance)
        model = Net()
        cmap = recon.profile(
            model,
            self.loader(),
            losses,
            optimizer=self.optimizer(model.parameters()),
            scheduler=self.scheduler,
            method=self.method,
            **{**self.options, **options},
        )
        return cmap, model.state_dict()

    def in_pieces(self, steps, how=crash, seconds=0.0):
        """The same with an end after so many steps of each piece."""
        for number, count in enumerate(steps):
            # Another seed: it must not matter what a process begins with, once it goes on from a checkpoint.
            with pytest.raises((CrashError, KeyboardInterrupt)):
                self.resume(crashing_losses(count, how), chance=number, checkpoint_seconds=seconds)
            assert self.path.exists()
        return self.resume(chance=99)

    def resume(self, losses=LOSSES, **options):
        return self.run(losses, checkpoint=self.path, resume=True, **options)


def text(cmap, path):
    """The map's file, without the seconds."""
    cmap.save(path)
    return re.sub(r'"seconds": [\d.]+', "", path.read_text())


def assert_same(one, other, path):
    assert text(one[0], path / "one") == text(other[0], path / "other")
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.checkpoint"


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_goes_on_with_the_same_batches(path, tmp_path, caplog, loader):
    caplog.set_level("WARNING")
    training = Training(path, loader)
    # In the first epoch, at the first step after its end, and in the second epoch.
    assert_same(training.in_pieces([3, 5, 6]), training.run(), tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(("floor", "pieces"), [(None, [9, 4]), (2, [19, 6])], ids=["plain", "floor"])
def test_gathered_batches_go_on(path, tmp_path, caplog, monkeypatch, floor, pieces):
    monkeypatch.setitem(LOADERS, "one task a batch", OneTaskABatch)
    training = Training(path, "one task a batch", method="pcgrad", accumulate="tasks", floor=floor)
    assert_same(training.in_pieces(pieces), training.run(), tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_floor_in_joint_steps_goes_on(path, tmp_path):
    training = Training(path, "joint", method="pcgrad", floor=2)
    assert_same(training.in_pieces([5, 8]), training.run(), tmp_path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_optimizers_and_schedulers_go_on(path, tmp_path, optimizer, scheduler):
    training = Training(path, "recon's", optimizer, scheduler)
    assert_same(training.in_pieces([4, 5]), training.run(), tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        *("uw", "dwa:temperature=1.0", "pcgrad", "cagrad:c=0.5", "mgda", "gradvac", "graddrop", "modo", "excessmtl"),
        *("joint:weights=a:0.3/b:1.7", "gradnorm", "rlw", "stch:reference=0.1/0", "imtl-l+pcgrad"),
    ],
)
@pytest.mark.parametrize("loader", ["shuffle", "missing labels"])
def test_every_method_goes_on(path, tmp_path, method, loader):
    training = Training(path, loader, "sgd", method=method, epochs=4)
    assert_same(training.in_pieces([4, 5, 6]), training.run(), tmp_path)


@pytest.mark.parametrize(
    "options", [{"every": 4}, {"memory": "sketch"}, {"threshold": -0.3, "every": 2}, {"until_stable": 0.7, "top_k": 1}]
)
def test_the_profiler_goes_on(path, tmp_path, options):
    training = Training(path, **options)
    assert_same(training.in_pieces([4, 5, 6]), training.run(), tmp_path)


def test_a_crash_loses_what_was_done_since_the_last_checkpoint_and_nothing_else(path, tmp_path):
    training = Training(path)
    whole = training.run()
    assert_same(training.in_pieces([9, 9], seconds=math.inf), whole, tmp_path)


@pytest.mark.parametrize("steps", [[1], [6], [7, 1, 1], [12, 6]])
def test_control_c_waits_for_the_end_of_the_step_and_loses_nothing(path, tmp_path, steps):
    training, whole = Training(path), Training(path).run()
    made = []
    for count in steps:
        with pytest.raises(KeyboardInterrupt):
            training.resume(crashing_losses(count, control_c), checkpoint_seconds=math.inf, on_checkpoint=made.append)
    assert [cmap.steps for cmap in made][-1] == sum(steps)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(training.resume(), whole, tmp_path)


def test_a_second_control_c_does_not_wait(path):
    def twice():
        control_c()
        control_c()
        raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        Training(path).resume(crashing_losses(2, twice), checkpoint_seconds=math.inf)
    assert not path.exists()  # the step was not whole


@pytest.mark.parametrize("number", [1, 2, 3])
def test_on_epoch_is_called_once_for_each_epoch_whatever_it_draws(path, tmp_path, number):
    seen = []

    def evaluate(epoch):
        torch.rand(3)
        seen.append(epoch.number)

    def interrupted(epoch):
        torch.rand(1)
        if epoch.number == number:
            raise KeyboardInterrupt
        evaluate(epoch)

    training = Training(path, "two workers, generator")
    whole = training.run(on_epoch=evaluate)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        training.resume(on_epoch=interrupted)
    before = list(seen)
    seen.clear()
    resumed = training.resume(on_epoch=evaluate)
    assert before + seen == [1, 2, 3]
    if number == 1:  # later ones drew one number more than `evaluate` alone
        assert_same(resumed, whole, tmp_path)


def test_history_and_seconds_add_up(path):
    def train(model, chance, losses=LOSSES, **options):
        seed(chance)
        loader = LOADERS["shuffle"]()
        return recon.train(model, loader, losses, optimizer=OPTIMIZERS["adam"](model.parameters()), epochs=3, **options)

    seed(0)
    model = Net()
    whole = train(model, 0)
    so_far = []
    for _ in range(2):
        seed(0)
        model = Net()
        with pytest.raises(CrashError):
            train(model, 0, crashing_losses(8, crash), checkpoint=path, resume=True, checkpoint_seconds=0,
                  on_checkpoint=so_far.append)  # fmt: skip
    resumed = train(model, 7, checkpoint=path, resume=True)
    assert [dataclasses.replace(e, seconds=0) for e in resumed.epochs] == [
        dataclasses.replace(e, seconds=0) for e in whole.epochs
    ]
    assert resumed.steps == 18
    # Each epoch's end is saved too, after its last step.
    assert [history.steps for history in so_far] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14]
    assert so_far[-1].steps == 14 and resumed.seconds > so_far[-1].seconds > so_far[0].seconds > 0


def test_epochs_may_grow(path, tmp_path):
    training = Training(path, "two workers")
    training.resume(epochs=1)
    assert_same(training.resume(epochs=3), training.run(), tmp_path)
    again = training.resume(epochs=3, chance=5)
    assert_same(again, training.run(), tmp_path)
    with pytest.raises(CheckpointError, match="is already in epoch 3, but epochs is 2"):
        training.resume(epochs=2)


def test_stop_ends_the_training_in_the_middle_of_an_epoch(path):
    def train(losses=LOSSES, **options):
        seed(0)
        model, calls = Net(), []

        def stop():
            calls.append(1)
            return profiler.steps >= 9

        profiler = recon.Profiler(model)
        optimizer = OPTIMIZERS["adam"](model.parameters())
        options |= {"epochs": 4, "profiler": profiler, "stop": stop, "optimizer": optimizer}
        return recon.train(model, LOADERS["shuffle"](), losses, **options), model, profiler

    history, model, profiler = train()
    assert [epoch.steps for epoch in history.epochs] == [6, 3] and history.steps == profiler.steps == 9
    assert set(history.epochs[1].losses) == {"a", "b"}
    for at, how in ((4, crash), (5, control_c)):  # the second one just when it is to stop
        with pytest.raises((CrashError, KeyboardInterrupt)):
            train(crashing_losses(at + (how is control_c), how), checkpoint=path, resume=True, checkpoint_seconds=0)
    for _ in range(2):
        resumed, other, _ = train(checkpoint=path, resume=True)
        assert [epoch.losses for epoch in resumed.epochs] == [epoch.losses for epoch in history.epochs]
        assert all(torch.equal(v, other.state_dict()[name]) for name, v in model.state_dict().items())


def test_nothing_to_resume_from_begins_and_says_so(path, tmp_path, caplog):
    caplog.set_level("INFO", "recon")
    training = Training(path)
    assert_same(training.resume(), training.run(), tmp_path)
    assert f"There is no checkpoint {path}: starting from the beginning." in caplog.text


def test_a_checkpoint_is_not_overwritten_by_another_training(path):
    training = Training(path)
    with pytest.raises(CrashError):
        training.run(crashing_losses(4, crash), checkpoint=path, checkpoint_seconds=0)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"exists already.*--resume.*delete the file"):
        training.run(checkpoint=path)
    assert path.read_bytes() == before


@pytest.fixture
def begun(path):
    training = Training(path, "recon's", scheduler="cosine", settings={"problem": "noise"})
    with pytest.raises(CrashError):
        training.resume(crashing_losses(4, crash), checkpoint_seconds=0)
    return training


OTHERS = {
    "problem": ({"settings": {"problem": "silence"}}, "problem is silence now, but was noise"),
    "threshold": ({"threshold": -0.2}, "threshold is -0.2 now, but was -0.1"),
    "every": ({"every": 3}, "every is 3 now, but was 1"),
    "memory": ({"memory": "sketch"}, "memory is sketch now, but was exact"),
    "method": ({"method": "pcgrad"}, "method is pcgrad now, but was joint"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings_are_refused(begun, path, case):
    options, words = OTHERS[case]
    before = path.read_bytes()
    begun.method = options.pop("method", "joint")
    with pytest.raises(CheckpointError, match=words) as caught:
        begun.resume(**options)
    assert str(path) in str(caught.value) and "delete the file" in str(caught.value)
    assert path.read_bytes() == before


def test_another_training_is_refused(begun, path):
    def refused(words):
        with pytest.raises(CheckpointError, match=words):
            begun.resume()

    optimizer = begun.optimizer
    begun.optimizer = lambda parameters: torch.optim.AdamW(parameters, 0.02)
    refused(r"optimizer\.lr is 0\.02 now, but was 0\.01|optimizer\.initial_lr")
    begun.optimizer = OPTIMIZERS["sgd"]
    refused("optimizer is SGD now, but was AdamW")
    begun.optimizer = optimizer
    begun.scheduler = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 36)
    refused(r"scheduler\.T_max is 36 now, but was 18")
    begun.scheduler = None
    refused("scheduler is not given now, but was CosineAnnealingLR")
    begun.scheduler = SCHEDULERS["cosine"]
    begun.loader = lambda: shuffled(TensorBatches(*tensors()), 12, seed=2)
    refused("number of batches is 4 now, but was 6")
    begun.loader = lambda: DataLoader(TensorBatches(*tensors()), sampler=None, batch_sampler=[[0, 1]] * 6)
    refused("does not fit this training .*generator")


def test_another_model_is_refused(begun, monkeypatch):
    monkeypatch.setattr(Net, "__init__", partial(Net.__init__, width=5))
    with pytest.raises(TypeError):
        Net(width=3, other=1)
    monkeypatch.undo()
    wide = Net.__init__
    monkeypatch.setattr(Net, "__init__", lambda self: wide(self, 9))
    with pytest.raises(CheckpointError, match=r"the model's stem\.weight is \(9, 6\) .*, but was \(8, 6\)"):
        begun.resume()

    def frozen(self):
        wide(self)
        self.stem.weight.requires_grad_(False)

    monkeypatch.setattr(Net, "__init__", frozen)
    with pytest.raises(CheckpointError, match=r"the model's stem\.weight is .*, frozen now"):
        begun.resume()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "folder", "state dict", "version", "field"])
def test_a_damaged_or_foreign_checkpoint(begun, path, damage):
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "state dict":
        torch.save(Net().state_dict(), path)
    elif damage in ("version", "field"):
        state = torch.load(path, weights_only=True)
        state["version"] = 99 if damage == "version" else state["version"]
        state["meter"] = state["meter"] if damage == "version" else {"number": 1}
        torch.save(state, path)
    else:
        i, j = len(content) // 2, len(content) // 2 + 999
        flipped = content[:i] + bytes(255 - byte for byte in content[i:j]) + content[j:]
        changed = {"empty": b"", "cut": content[:-1000], "flipped": flipped, "text": b"not a checkpoint"}
        path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        begun.resume()


def test_a_state_that_cannot_be_kept_is_refused_at_the_first_checkpoint(path):
    with pytest.raises(CheckpointError, match=r"settings, hold something other than tensors"):
        Training(path, settings={"lr": np.float64(0.1)}).resume(checkpoint_seconds=0)
    with pytest.raises(CheckpointError, match=r"settings, hold something other than tensors"):
        Training(path, settings={"lr": lambda: 0.1}).resume(checkpoint_seconds=0)
    assert os.listdir(path.parent) == []


def test_bad_calls(path):
    with pytest.raises(UsageError, match="resume=True needs the path of a checkpoint"):
        Training(path).run(resume=True)
    with pytest.raises(UsageError, match="checkpoint_seconds is -1"):
        Training(path).resume(checkpoint_seconds=-1)


def test_a_loader_that_raises(path, tmp_path):
    class Broken(Noisy):
        def __getitem__(self, index):
            if index == 30 and not mended:
                raise OSError("no such picture")
            return super().__getitem__(index)

    for workers in (0, 2):
        mended = False
        training = Training(path)
        training.loader = lambda workers=workers: DataLoader(Broken(), 8, num_workers=workers)
        with pytest.raises(LoaderError, match=r"raised OSError: no such picture.* batch 4 of epoch 1") as caught:
            training.resume(checkpoint_seconds=math.inf)
        assert caught.value.__cause__ is not None and "\n" not in str(caught.value)
        assert workers or re.search(re.escape(__file__) + r":\d+, in __getitem__", str(caught.value))
        mended = True
        assert_same(training.resume(), training.run(), tmp_path)
        path.unlink()


@pytest.mark.parametrize("at", [3, 9])
def test_a_loader_that_does_not_repeat_its_batches_is_told(path, caplog, at):
    passes = []

    def unseeded():
        passes.append(1)
        return iter(shuffled(TensorBatches(*tensors()), 8, seed=len(passes)))

    class Unseeded:
        __iter__ = staticmethod(unseeded)

    training = Training(path)
    training.loader = Unseeded
    with pytest.raises(CrashError):
        training.resume(crashing_losses(at, crash), checkpoint_seconds=0)
    assert "does not repeat its batches" not in caplog.text
    training.resume()
    assert f"batch {(at - 1) % 6} of epoch {1 + at // 6} is not the one that was trained on" in caplog.text


def test_fewer_batches_than_are_done(path):
    training = Training(path, "a stream")
    training.loader = lambda: DataLoader(Stream(), 8)
    with pytest.raises(CrashError):
        training.resume(crashing_losses(6, crash), checkpoint_seconds=0)
    training.loader = lambda: DataLoader(Stream(), 48)
    with pytest.raises(CheckpointError, match="gave 1 batches, but 5 of epoch 1 are done"):
        training.resume()


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(path):
    class Spoils(torch.optim.SGD):
        def step(self):
            super().step()
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 3:
                self.param_groups[0]["params"][0].data.fill_(float("nan"))

    training = Training(path)
    training.optimizer = lambda parameters: Spoils(parameters, 0.01)
    with pytest.raises(GradientError, match="in step 4"):
        training.resume(checkpoint_seconds=0)
    state = torch.load(path, weights_only=True)
    assert state["stream"]["drawn"] == 2 and all(value.isfinite().all() for value in state["model"].values())


PROBLEM = """
import os, sys, time
import torch
from torch import nn
from torch.nn.functional import mse_loss

from recon.problems.problem import Metric, Problem, Task
from recon.problems.loading import TensorBatches, shuffled


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.heads = nn.ModuleDict({"up": nn.Linear(8, 1), "down": nn.Linear(8, 1)})

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"up": nn.Linear(6, 1), "down": nn.Linear(6, 1)})

    def forward(self, x):
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class OneAlone(Net):
    def forward(self, x):
        return super().forward(x) | {"down": x.sum(1)}


batches = 0


def noisy(x):
    global batches
    batches += 1
    if batches == int(os.environ.get("STOP_AT", 0)):
        print("stopped", file=sys.stderr, flush=True)
        time.sleep(3600)
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return x + 0.1 * torch.randn_like(x)


def make_loaders(seed):
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    data = TensorBatches(x, {"up": x.sum(1), "down": x[:, 0] - x[:, 1]}, noisy)
    return shuffled(data, 8, seed), []


def problem(make_model=Net, loss=mse_loss, loaders=make_loaders):
    return Problem("tiny", [Task("up", loss), Task("down", mse_loss)], make_model, loaders, epochs=2)


def apart():
    return problem(Apart)


def one_alone():
    return problem(OneAlone)


def nan():
    return problem(loss=lambda output, target: mse_loss(output, target) * float("nan"))


def nan_later():
    calls = []

    def loss(output, target):
        calls.append(1)
        return mse_loss(output, target) * (1 if len(calls) < 16 else float("nan"))  # the first is of the look before

    return problem(loss=loss)


def bad_loader():
    class Loader:
        def __init__(self):
            self.loader = make_loaders(0)[0]

        def __iter__(self):
            for number, batch in enumerate(self.loader):
                if number == 7:
                    raise OSError("no such picture")
                yield batch

    return problem(loaders=lambda seed: (Loader(), []))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    def command(line):
        code = main(line.split())
        out, err = capsys.readouterr()
        return code, out, err

    return command


def wait_for_saves(child, path, count):
    """Until the child has written a file so many times, or has ended."""
    versions = set()
    while len(versions) <= count and child.is_alive():
        with suppress(FileNotFoundError):
            status = path.stat()
            versions.add((status.st_ino, status.st_mtime_ns))
        time.sleep(0.001)


def map_text(path):
    return re.sub(r'"seconds": [\d.]+', "", path.read_text())


def files(folder):
    return sorted(name for name in os.listdir(folder) if name not in ("__pycache__", "tiny.py", "child.log"))


LINE = "profile tiny.py:problem --epochs 4 --out map.json --resume"


def test_killed_at_any_moment_it_leaves_good_files_and_ends_with_the_same_map(folder, command):
    assert command(LINE)[0] == 0
    whole = map_text(folder / "map.json")
    (folder / "map.json").unlink()
    chance, killed, steps = random.Random(7), 0, []
    while True:
        child = in_child(LINE, pause=0.002)
        wait_for_saves(child, folder / "map.json.checkpoint", chance.randint(0, 6))
        child.join(chance.uniform(0, 0.005))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        killed += 1
        if (folder / "map.json.checkpoint").exists():
            torch.load(folder / "map.json.checkpoint", weights_only=True)
        if (folder / "map.json").exists():
            cmap = recon.ConflictMap.load(folder / "map.json")
            steps.append(cmap.steps)
            assert cmap.made_by.get("finished") is False or cmap.steps == 48
    assert child.exitcode == 0, (folder / "child.log").read_text()
    assert killed >= 3 and len(set(steps)) >= 3 and steps == sorted(steps)
    assert map_text(folder / "map.json") == whole
    assert files(folder) == ["map.json"]


def test_control_c_on_the_command_line(folder, command):
    assert command("profile tiny.py:problem --epochs 2 --threshold -0.2 --floor off --out whole.json")[0] == 0
    line = [*"-m recon_cli profile tiny.py:problem --epochs 2 --threshold -0.2 --floor off --out map.json".split()]
    environment = {**os.environ, "STOP_AT": "19", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *line], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        next(text for text in process.stderr if text.startswith("stopped"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1
    message = err.splitlines()
    assert message[-2] == "error: Interrupted. map.json.checkpoint keeps the training. Go on with:"
    assert (
        message[-1] == "  recon profile tiny.py:problem --epochs 2 --threshold -0.2 --floor off --out map.json --resume"
    )
    cmap = recon.ConflictMap.load("map.json")
    assert cmap.steps == 17 and cmap.made_by["finished"] is False and cmap.made_by["epoch"] == 2
    before = (folder / "map.json.checkpoint").read_bytes()
    code, _, err = command("profile tiny.py:problem --epochs 2 --threshold -0.2 --floor off --out map.json")
    assert code == 2 and "--resume" in err and "delete the file" in err
    code, _, err = command("profile tiny.py:problem --epochs 2 --threshold -0.3 --floor off --out map.json --resume")
    assert code == 2 and "threshold is -0.3 now, but was -0.2" in err
    code, _, err = command(
        "profile tiny.py:problem --seed 3 --epochs 2 --threshold -0.2 --floor off --out map.json --resume"
    )
    assert code == 2 and "--seed is 3 now, but was 0" in err and "Go on with" not in err
    assert (folder / "map.json.checkpoint").read_bytes() == before
    code, _, err = command(message[-1].removeprefix("  recon "))
    assert code == 0 and "Resuming from map.json.checkpoint: " in err
    assert map_text(folder / "map.json") == map_text(folder / "whole.json")
    assert files(folder) == ["map.json", "whole.json"]


def test_no_checkpoint_on_the_command_line(command):
    code, _, err = command("profile tiny.py:problem --epochs 1 --out map.json --resume")
    assert code == 0 and "There is no checkpoint map.json.checkpoint: starting from the beginning." in err


def test_a_finished_map_is_not_lost(folder, command):
    line = "profile tiny.py:problem --epochs 1 --out map.json"
    assert command(line)[0] == 0
    finished = (folder / "map.json").read_bytes()
    code, out, err = command(f"{line} --resume")
    assert code == 0 and "map.json is finished; there is nothing to resume." in err and "Saved map.json" in out
    for other in ("--seed 1", "--method pcgrad", "--lr 0.5", "--threshold -0.3"):  # another profile, which begins
        code, _, err = command(f"{line} --resume {other}")
        assert code == 0 and "will be replaced when the new one is finished" in err and "epoch 1/1" in err
        assert command(f"{line} --resume")[2].count("epoch 1/1") == 1
    finished = (folder / "map.json").read_bytes()
    process = subprocess.Popen(
        [sys.executable, *f"-m recon_cli {line} --seed 1 --epochs 50".split()],
        env={**os.environ, "STOP_AT": "30", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        next(text for text in process.stderr if text.startswith("stopped"))
    finally:
        process.kill()
    assert (folder / "map.json").read_bytes() == finished and (folder / "map.json.checkpoint").exists()


def test_killed_before_anything_was_saved_it_begins(folder, command):
    """Not even the same profile's older map is taken for the result: what was killed was about to replace it."""
    line = "profile tiny.py:problem --epochs 1 --out map.json"
    assert command(line)[0] == 0
    (folder / ".map.json.lock").write_text("process 1 on a machine")
    (folder / ".map.json.abcdefgh.partial").write_text("")
    os.utime(folder / "map.json", (1e9, 1e9))
    code, _, err = command(f"{line} --resume")
    assert code == 0 and "epoch 1/1" in err and "nothing to resume" not in err
    assert files(folder) == ["map.json"]
    # One that was killed when all was done has nothing left to do.
    (folder / ".map.json.lock").write_text("process 1 on a machine")
    os.utime(folder / ".map.json.lock", (1e9, 1e9))
    code, _, err = command(f"{line} --resume")
    assert code == 0 and "nothing to resume" in err
    assert files(folder) == ["map.json"]


def test_a_damaged_checkpoint_on_the_command_line(folder, command):
    (folder / "map.json.checkpoint").write_bytes(b"PK\x03\x04 and then nothing")
    code, out, err = command(LINE)
    assert (code, out) == (2, "")
    assert "map.json.checkpoint cannot be read" in err and "Traceback" not in err and "Go on with" not in err


def test_a_loader_that_raises_on_the_command_line(folder, command):
    code, out, err = command("profile tiny.py:bad_loader --out map.json")
    assert (code, out) == (1, "")
    assert "raised OSError: no such picture" in err and "batch 8 of epoch 1" in err and "tiny.py:" in err
    assert "recon profile tiny.py:bad_loader --out map.json --resume" in err
    assert recon.ConflictMap.load("map.json").steps == 7
    assert files(folder) == ["map.json", "map.json.checkpoint"]


def test_a_loss_that_becomes_nan_on_the_command_line(folder, command):
    code, out, err = command("profile tiny.py:nan_later --floor off --out map.json")
    assert (code, out) == (1, "")
    assert "The loss of task 'up' is nan in step 3 of epoch 2" in err and "delete it" in err and "Go on" not in err
    assert recon.ConflictMap.load("map.json").steps == 12
    assert files(folder) == ["map.json", "map.json.checkpoint"]


USELESS = {
    "nan": (1, "The loss of task 'up' is nan before anything is trained"),
    "one_alone": (1, "'down'"),
    "apart": (2, "No layer is shared"),
}


@pytest.mark.parametrize("function", USELESS)
def test_nothing_is_left_of_a_training_without_a_map(folder, command, function):
    expected, words = USELESS[function]
    for more in ("", " --json"):
        code, out, err = command(f"profile tiny.py:{function} --epochs 1 --out map.json{more}")
        assert code == expected and words in (json.loads(out)["error"]["message"] if more else err)
        assert "Traceback" not in err and "Go on with" not in err
        assert files(folder) == []


def test_a_full_disk_leaves_the_older_files(folder):
    def run(line, limit):
        child = in_child(line, limit)
        child.join()
        return child.exitcode, (folder / "child.log").read_text()

    code, log = run(LINE, limit=4096)
    assert code == 1 and f"Cannot write map.json.checkpoint: {os.strerror(errno.EFBIG)}. Free some space" in log
    assert files(folder) == []
    in_pieces = in_child(LINE, pause=0.02)
    while not (folder / "map.json").exists():
        time.sleep(0.005)
    in_pieces.kill()
    in_pieces.join()
    before = {name: (folder / name).read_bytes() for name in ("map.json", "map.json.checkpoint")}
    full = len(before["map.json.checkpoint"])
    # In the pickle, in a tensor, in the zip file's directory at the end.
    for limit in (3000, 8000, full // 2, full - 3000, full - 30):
        code, log = run(LINE, limit)
        assert code == 1 and "Cannot write map.json.checkpoint" in log and "Traceback" not in log, (limit, log)
        assert f"Go on with:\n  recon {LINE}" in log
        assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert run(LINE, None)[0] == 0 and files(folder) == ["map.json"]
