"""`recon check`: exit codes, text and JSON; and what `recon profile` and `recon bench` refuse by its cheap part."""

import json
import re

import pytest

from recon.profiling import preflight

PROBLEM = """
import random
import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError

import recon


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.heads = nn.ModuleDict({"up": nn.Linear(8, 1), "down": nn.Linear(8, 1)})

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class Reads(Net):
    def forward(self, x):
        if self.stem(x).max().item() > 1e9:
            x = x / 2
        return super().forward(x)


class Broken(Net):
    def forward(self, x):
        raise ValueError("forward went wrong")


class Alone(Net):
    def forward(self, x):
        return {task: head(self.norm(self.stem(x)).detach()).squeeze(1) for task, head in self.heads.items()}


class Data(Dataset):
    def __init__(self):
        self.x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index] * random.uniform(0.9, 1.1) + 0.1 * torch.randn(6) + float(np.random.normal()) * 0.1
        return x, {"up": self.x[index].sum(), "down": self.x[index, 0]}


def problem(model=Net, loss=mse_loss, loaders=None):
    def make_loaders(seed):
        return DataLoader(Data(), 8, shuffle=True), DataLoader(Data(), 8)

    error = recon.Metric("error", MeanAbsoluteError, higher_is_better=False)
    return recon.Problem(
        name="tiny",
        tasks=[recon.Task("up", loss, [error]), recon.Task("down", mse_loss, [error])],
        make_model=model,
        make_loaders=loaders or make_loaders,
        epochs=1,
    )


def reads():
    return problem(Reads)


def broken():
    return problem(Broken)


def alone():
    return problem(Alone)


def nan():
    return problem(loss=lambda output, target: mse_loss(output, target) * float("nan"))


def turns():
    x = torch.randn(8, 6)
    batches = [(x, {"up": x[:, 0]}), (x, {"down": x[:, 1]})] * 3
    return problem(loaders=lambda seed: (batches, batches))


def unlabelled():
    x = torch.randn(8, 6)
    batches = [(x, {"up": x[:, 0]})] * 6
    return problem(loaders=lambda seed: (batches, batches))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    (folder / "tiny.py").write_text(PROBLEM)
    return folder


def test_a_good_problem(command):
    code, out, err = command("check tiny.py:problem --seed 3")
    assert code == 0 and err == ""
    assert "In the first batch, all tasks meet." in out
    assert "Shared layers: 2 of 4, with 72 of 90 parameters." in out
    assert re.search(r"profiled, sketch +[\d.]+ ms +[\d.]+x +\+", out)
    assert "Profiling and converting would work." in out
    assert out.endswith("  recon profile tiny.py:problem --seed 3 --out map.json\n")


def test_the_report_as_json(command, ask):
    data = ask("check tiny.py:problem")
    assert data["ok"] and data["problem"] == "tiny" and data["tasks"] == ["up", "down"]
    assert data["shared"] == {"stem": ["up", "down"], "norm": ["up", "down"]} and data["macs"] == 6 * 8 + 2 * 8
    assert data["step_seconds"].keys() == {"plain", "exact", "sketch"} and data["problems"] == []
    code, out, _ = command("check tiny.py:nan --json")
    assert code == 1 and json.loads(out)["losses"]["up"] is None and not json.loads(out)["ok"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("reads", r"max\(\)\.item\(\) > 1e9"),
        ("broken", r"ValueError: forward went wrong at tiny\.py:\d+, in forward: `raise ValueError"),
        ("alone", "No layer is shared"),
        ("nan", "The loss of task 'up' is nan before anything is trained"),
        ("turns", r"No two tasks meet in the first 6 batches \(up in 3, down in 3\)"),
        ("unlabelled", r"No batch of the loader \(6 in all\) had a target for 'down'"),
    ],
)
def test_a_problem_of_the_problem_gives_exit_code_1(command, function, words):
    code, out, _ = command(f"check tiny.py:{function}")
    assert code == 1
    assert re.search(words, " ".join(out.split())), out
    assert "in the way of profiling and converting" in out and "recon profile" not in out


def test_mode_per_task_leaves_the_forward_as_it_is(command):
    assert command("check tiny.py:reads --mode per-task")[0] == 0


def test_wrong_usage_gives_exit_code_2(refused):
    refused("check tiny.py:problme", "problem")
    refused("check tiny.py:problem --mode fans", "fan")


@pytest.mark.parametrize("verb", ["profile", "bench"])
@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("broken", 1, "Your code raised ValueError: forward went wrong"),
        ("alone", 2, "No layer is shared"),
        ("nan", 1, "The loss of task 'up' is nan before anything is trained"),
        ("turns", 2, "No two tasks meet in the first 6 batches"),
        ("unlabelled", 2, "No batch of the loader (6 in all) had a target for 'down'"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_it_is_trained(
    command, tmp_path, monkeypatch, verb, function, code, words
):
    monkeypatch.setattr("recon.profiling.warm_up.train", None)
    got, _, err = command(f"{verb} tiny.py:{function} --out", tmp_path / "out")
    assert (got, words in err) == (code, True), err


def test_layers_that_are_not_shared_are_refused_before_anything_is_trained(command, tmp_path, monkeypatch):
    monkeypatch.setattr("recon.profiling.warm_up.train", None)
    code, _, err = command("profile tiny.py:problem --layers heads.up --out", tmp_path / "map.json")
    assert code == 2 and "is shared: the losses of two tasks depend on none of them" in err and "stem, norm" in err


def test_a_unit_is_shared_where_its_layers_are_reached_by_different_tasks(command, tmp_path):
    line = "profile tiny.py:problem --epochs 1 --layers heads.* --units heads --out"
    assert command(line, tmp_path / "map.json")[0] == 0


def test_batches_of_one_task_turn_green_with_joint_steps(command):
    code, out, _ = command("check tiny.py:turns --accumulate tasks")
    assert code == 0 and "In the first 3 joint steps, all tasks meet." in out
    assert "recon profile tiny.py:turns --accumulate tasks --out map.json" in out


def test_the_look_does_not_change_the_profile(command, tmp_path, monkeypatch):
    looks = []
    inspect = preflight.inspect_batches
    monkeypatch.setattr(preflight, "inspect_batches", lambda *args: looks.append(args) or inspect(*args))
    maps = []
    for name in ("with", "without"):
        assert command("profile tiny.py:problem --epochs 3 --out", tmp_path / name)[0] == 0
        maps.append(json.loads((tmp_path / name).read_text()))
        assert maps[-1]["made_by"].pop("seconds") > 0
        monkeypatch.setattr(preflight, "refuse_unprofilable", lambda *args, **chosen: None)
    assert len(looks) == 1 and maps[0] == maps[1]
