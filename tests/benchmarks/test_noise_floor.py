"""The benchmark of the noise floor, on a few samples."""

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

import recon

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "noise_floor.py"
PLANS = ("by count", "by rate", "by excess", "random", "first", "joint")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("noise_floor_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "noise_floor_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_it_goes_on_where_it_stopped_and_says_what_is_missing(benchmark, tmp_path, capsys):
    path = tmp_path / "out.json"
    words = ["--problems", "digits", "nyuv2", "--out", str(path), "--workers", "1", "--quick"]
    benchmark.main([*words, "--runs", "3"])
    some, out = json.loads(path.read_text())["digits"]["runs"], capsys.readouterr().out
    assert len(some) == 3
    assert "digits (PARTIAL: " in out
    assert "nyuv2: left out, for it needs --data-root" in out
    benchmark.main(words)
    runs, out = json.loads(path.read_text())["digits"]["runs"], capsys.readouterr().out
    assert "PARTIAL" not in out
    assert {name: runs[name] for name in some} == some

    maps = [recon.ConflictMap.load(tmp_path / f"out.digits.{seed}.map.json") for seed in (0, 1)]
    assert all(cmap.has_floor for cmap in maps)
    tops = [set(cmap.ranking()[: len(cmap.layers) // 4]) for cmap in maps]
    by_count, *rest = [line for line in out.splitlines() if line.startswith(PLANS)]
    assert f"{len(tops[0] & tops[1]) / len(tops[0] | tops[1]):.2f}" in by_count
    deltas = []
    for seed, top in enumerate(tops):
        joint, plan = runs[f"seed {seed}: joint"], runs[f"seed {seed}: {' '.join(sorted(top))}"]
        changes = [100 * (plan[task]["accuracy"] / joint[task]["accuracy"] - 1) for task in joint]
        deltas.append(fmean(changes))
    row = next(line for line in rest if line.startswith("by count"))
    assert f"{fmean(deltas):+.2f} ± {stdev(deltas):.2f}" in row


def test_other_settings_need_another_file(benchmark, tmp_path):
    words = ["--problems", "digits", "--out", str(tmp_path / "out.json"), "--workers", "1"]
    (tmp_path / "out.json").write_text(json.dumps({"digits": {"settings": {}, "runs": {}}}))
    with pytest.raises(SystemExit, match="Choose another --out"):
        benchmark.main([*words, "--quick"])
