"""The benchmark of plans, on a problem of a few samples."""

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

import recon
from tests.cli.test_cli import PROBLEM

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plans.py"
VARIANTS = ("single-task", "joint", "Recon", "max_macs=1.5", "random", "first", "last")


@pytest.fixture
def plans(monkeypatch, tmp_path):
    """The benchmark, with one tiny study."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("plans_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plans_benchmark", module)
    spec.loader.exec_module(module)
    (tmp_path / "tiny.py").write_text(PROBLEM)
    name = f"{tmp_path / 'tiny.py'}:problem"
    monkeypatch.setattr(module, "STUDIES", {name: module.study(name, epochs=1, profile_epochs=2)})
    return module


def run(plans, tmp_path, capsys, *options):
    """What a call prints, and the file afterwards."""
    (name,) = plans.STUDIES
    words = ["--problems", name, "--out", str(tmp_path / "out.json"), "--seeds", "2", "--budget", "1.5"]
    plans.main([*words, "--workers", "1", "--rounds", "1", *options])
    (entry,) = json.loads((tmp_path / "out.json").read_text()).values()
    return capsys.readouterr().out, entry


def test_it_goes_on_where_it_stopped_and_prints_means_and_spreads(plans, tmp_path, capsys):
    out, some = run(plans, tmp_path, capsys, "--runs", "3")
    assert len(some["runs"]) == 3 and not some["seconds_per_step"]
    out, entry = run(plans, tmp_path, capsys)
    assert len(entry["runs"]) == 2 * len(VARIANTS)
    assert all(entry["runs"][name] == done for name, done in some["runs"].items())
    lines = [next(line for line in out.splitlines() if line.startswith(variant)) for variant in VARIANTS]

    joint, single = ([entry["runs"][f"{label}, seed {s}"] for s in (0, 1)] for label in ("joint", "single-task"))
    lower = {task: {"error": False} for task in ("up", "down")}
    deltas = [recon.delta_m(a["results"], b["results"], lower) for a, b in zip(joint, single, strict=True)]
    assert f"{fmean(deltas):.2f} ± {stdev(deltas):.2f}" in lines[1]
    assert "0.00 ± 0.00" in lines[0]
    assert set(entry["seconds_per_step"]) == {line.split("  ")[0] for line in lines[1:]}


def test_other_settings_need_another_file(plans, tmp_path, capsys):
    run(plans, tmp_path, capsys, "--runs", "1")
    with pytest.raises(SystemExit, match="Choose another --out"):
        run(plans, tmp_path, capsys, "--epochs", "2")
