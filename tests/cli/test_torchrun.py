"""`torchrun -m recon_cli profile` and `train`: what two processes make of a problem is what one makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recon
from recon_cli.main import main
from tests.ranks import PATIENCE, needs_gloo

pytestmark = needs_gloo

PROBLEM = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from recon import Problem, Task


class Net(nn.Module):  # without batch statistics, which are those of a rank's own part of the batch
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.kind, self.size = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        features = self.body(x)
        return {"kind": self.kind(features), "size": self.size(features)}


def loaders(seed):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=draw, dtype=torch.float64)
    kind = torch.randint(3, (320,), generator=draw)
    samples = [(x[i], {"kind": kind[i], "size": x[i].sum().sin().view(1)}) for i in range(320)]
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(samples, 32, shuffle=True, generator=shuffle), DataLoader(samples, 32)


def problem():
    tasks = [Task("kind", F.cross_entropy), Task("size", F.mse_loss)]
    return Problem("plain", tasks, lambda: Net().double(), loaders, epochs=2)
"""


def by_two(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in two processes."""
    return subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m recon_cli".split(), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def by_one(*arguments: str) -> None:
    """Runs the same in this one."""
    assert main(list(arguments)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "plain.py").write_text(PROBLEM)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # importing a problem's file puts its folder there


@pytest.mark.slow  # tests/profiling/test_distributed.py checks the counts of two processes
def test_two_processes_make_the_map_of_one(folder):
    by_one("profile", "plain.py:problem", "--out", "one.json")
    done = by_two(folder, "profile", "plain.py:problem", "--out", "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved two.json") == 1 and done.stderr.count("epoch 1/3") == 1
    one, two = (recon.ConflictMap.load(folder / name) for name in ("one.json", "two.json"))
    assert two.made_by["processes"] == 2 and one.steps == two.steps
    assert [layer.name for layer in one.layers] == [layer.name for layer in two.layers] == ["body.0", "body.2"]
    for first, second in zip(one.layers, two.layers, strict=True):
        assert first.histogram.tolist() == second.histogram.tolist()
        assert first.series.tolist() == second.series.tolist()


def test_two_processes_train_the_model_of_one(folder, capsys):
    line = "train plain.py:problem --method uw+pcgrad --clip 0.5 --accumulate 2 --json --out".split()
    capsys.readouterr()
    by_one(*line, "alone")
    done = by_two(folder, *line, "both")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 1/2") == 1
    runs = [json.loads(out) for out in (capsys.readouterr().out, done.stdout)]
    one, two = (load_file(folder / name / "weights.safetensors") for name in ("alone", "both"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12)
    one, two = runs
    assert one["best"].keys() == two["best"].keys() == {"kind", "size"}
    for task, results in one["results"].items():
        assert two["results"][task] == pytest.approx(results, rel=1e-6)  # metrics are float32
        assert two["mean_weights"][task] == pytest.approx(one["mean_weights"][task], rel=1e-9)
    alone, both = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "both")
    )
    assert len(alone) == len(both) == 2 + one["history"][0]["steps"] * 2
    for first, second in zip(alone, both, strict=True):
        assert first.keys() == second.keys()
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-9)
        assert second["weights"] == pytest.approx(first["weights"], rel=1e-9)
    assert not list((folder / "both").glob("*.checkpoint"))


def test_a_verb_for_one_process_says_so_once(folder):
    done = by_two(folder, "methods", "--json")
    assert done.returncode != 0
    assert json.loads(done.stdout)["error"]["message"].startswith("`recon methods` runs in one process, but 2 were")
    assert "[rank 1]" not in done.stderr


@pytest.mark.parametrize("line", ["profile plain.py:problem", "train plain.py:problem"])
def test_several_processes_do_not_resume(folder, line, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*line.split(), "--resume", "--out", "resumed"]) == 2
    assert "error: --resume goes on from a checkpoint" in capsys.readouterr().err
    assert not list(folder.glob("resumed*"))
