"""Problems whose tasks have loaders of their own, on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file

import recon
from recon_cli.main import main

FILE = """
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import recon


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in "abc"})

    def forward(self, x):
        x = self.body(x)
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def loaders():
    draw = torch.Generator().manual_seed(0)
    xs = {task: torch.randn(8 * n, 6, generator=draw) for n, task in enumerate("abc", start=3)}
    return {task: [(part, part.sum(1) * (-1 if task == "b" else 1)) for part in x.split(8)] for task, x in xs.items()}


def problem(join):
    tasks = [recon.Task(task, mse_loss) for task in "abc"]
    return recon.Problem("three", tasks, Net, lambda seed: (join(loaders()), join(loaders())), epochs=1)


def one_by_one(loaders):
    return [(x, {task: y}) for step in zip(*loaders.values()) for task, (x, y) in zip(loaders, step)]


def joint():
    return problem(recon.joint_loader)


def alternating():
    return problem(one_by_one)


def shuffled():
    def join(loaders):
        sets = {task: TensorDataset(*map(torch.cat, zip(*pairs))) for task, pairs in loaders.items()}
        return recon.joint_loader({task: DataLoader(data, 8, shuffle=True) for task, data in sets.items()})

    return problem(join)


def unjoined():
    return problem(lambda loaders: loaders)
"""


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.py").write_text(FILE)

    def command(line):
        code = main([*line.split(), "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.mark.parametrize(("name", "option"), [("joint", ""), ("alternating", "--accumulate tasks")], ids=str)
def test_every_verb_takes_them(ask, tmp_path, name, option):
    three = f"three.py:{name}"
    for line in (
        f"profile {three} {option} --epochs 2 --threshold 0 --floor off --out map.json",
        f"convert {three} --map map.json --top-k 1 --out branched",
        f"train {three} {option} --model branched --method pcgrad --out run",
        f"train {three} {option} --single-task --out single",
        f"evaluate {three} --model run",
    ):
        code, out, err = ask(line)
        assert code == 0, (line, out, err)
    cmap = recon.ConflictMap.load("map.json")
    steps = 5 if name == "joint" else 3
    assert cmap.steps == 2 * steps
    assert set(cmap.observed()["body.0"].values()) == {2 * steps}
    assert cmap.made_by.get("accumulate") == ("tasks" if option else None)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["history"][0]["steps"] == steps and set(run["results"]) == set("abc")


@pytest.mark.parametrize("verb", ["profile", "train --method pcgrad", "train --method stch", "bench --epochs 1"])
def test_tasks_that_never_meet_are_refused_before_anything_is_trained(ask, tmp_path, verb):
    name, *more = verb.split()
    code, _, err = ask(f"{name} three.py:alternating {' '.join(more)} --out out")
    assert code == 2 and "No two tasks meet in the first 9 batches (a in 3, b in 3, c in 3)" in err
    assert all(way in err for way in ("joint_loader", "Window", "--accumulate tasks"))
    assert not list(tmp_path.glob("out/**/*.safetensors")) and not (tmp_path / "out").is_file()


def test_a_look_at_the_batches_is_no_part_of_the_training(ask, tmp_path, monkeypatch):
    weights = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr("recon.experiments.training.training.refuse_lonely", lambda *args: None)
        assert ask(f"train three.py:shuffled --method pcgrad --out run{looks}")[0] == 0
        weights.append(load_file(tmp_path / f"run{looks}" / "weights.safetensors"))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_joint_training_of_single_task_batches_is_as_ever(ask):
    code, _, err = ask("train three.py:alternating --out run")
    assert code == 0 and "meet" not in err


def test_a_dict_of_loaders_is_told_to_be_joined(ask):
    for line in ("profile three.py:unjoined --out map.json", "train three.py:unjoined --out run"):
        code, _, err = ask(line)
        assert code == 2 and "recon.joint_loader" in err


def test_a_schedule_needs_the_number_of_steps(ask):
    code, _, err = ask("train three.py:alternating --accumulate tasks --schedule cosine --out run")
    assert code == 2 and "needs the number of steps, but accumulate='tasks'" in err


@pytest.mark.parametrize("value", ["0", "task", "1.5"])
def test_accumulate_is_a_number_or_tasks(ask, value):
    code, _, err = ask(f"train three.py:joint --accumulate {value} --out run")
    assert code == 2 and "a whole number of at least 1, or tasks" in err


def test_the_options_of_a_step_are_those_of_the_map(ask):
    line = "profile three.py:joint --epochs 1 --floor off --clip 0.5 --accumulate 2 --amp bf16 --out map.json"
    assert ask(line)[0] == 0
    code, _, err = ask(f"{line} --resume")
    assert code == 0 and "is finished; there is nothing to resume" in err
    code, _, err = ask(f"{line.replace('--clip 0.5', '--clip 1')} --resume")
    assert code == 0 and "nothing to resume" not in err and recon.ConflictMap.load("map.json").made_by["clip"] == 1
