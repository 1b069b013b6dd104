"""The benchmark for a GPU, on a CPU and a few images."""

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from tests.problems.test_multi_fashion_mnist import sources, write

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_multi_fashion_mnist.py"
LABELS = ("joint, float32", "joint + Recon, float32", "pcgrad, float32", "pcgrad + Recon, float32")


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back afterwards
    # Steps of a quarter of the images: the network is the real one.
    monkeypatch.setattr("recon.problems.sets.multi_fashion_mnist.BATCH", 64)
    return module


def call(bench, tmp_path, *options):
    """The file after a call."""
    root, out = tmp_path / "data", tmp_path / "out.json"
    if not root.exists():
        write(root, sources(120))
    words = ["--data-root", str(root), "--out", str(out), "--train-samples", "64", "--seeds", "1", "--device", "cpu"]
    bench.main([*words, *options])
    return json.loads(out.read_text())


def test_every_variant_is_trained_once_and_told_beside_the_others(bench, tmp_path, capsys, monkeypatch):
    data = call(bench, tmp_path, "--epochs", "1")
    assert set(data["runs"]) == {f"{label}, seed 0" for label in LABELS} and data["epochs"] == 1
    joint, branched, *_ = (data["runs"][f"{label}, seed 0"] for label in LABELS)
    assert branched["parameters"] > joint["parameters"]
    out = capsys.readouterr().out
    assert "1 of the paper's 120 epochs" in out
    lines = [next(line for line in out.splitlines() if line.startswith(label)) for label in LABELS]
    assert f"{100 * fmean(branched['accuracy'].values()):.2f} %" in lines[1] and f"{joint['parameters']:,}" in lines[0]
    ratio = branched["seconds_per_step"] / joint["seconds_per_step"]
    assert f" {ratio:.2f} " in lines[1] and " 1.00 " in lines[0]

    del data["runs"]["pcgrad, float32, seed 0"]
    (tmp_path / "out.json").write_text(json.dumps(data))
    seen = []
    monkeypatch.setattr(bench.Bench, "run", lambda self, variant, seed, epochs: seen.append(variant) or dict(joint))
    again = call(bench, tmp_path)  # the length is that of the first call
    assert [variant.label for variant in seen] == ["pcgrad, float32"] and len(again["runs"]) == 4
    with pytest.raises(SystemExit, match="Choose another --out"):
        call(bench, tmp_path, "--epochs", "2")
    with pytest.raises(SystemExit, match="Choose another --out"):
        call(bench, tmp_path, "--amp")


def test_branching_and_methods_are_those_of_the_label(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "TIMED", 1)
    wanted = bench.variants(2, "bf16")
    assert [(v.method, v.branched, v.amp, v.seeds) for v in wanted] == [
        *((method, branched, "bf16", 2) for method in ("joint", "pcgrad") for branched in (False, True)),
        ("joint", False, None, 1),
    ]
    write(tmp_path, sources(120))
    problem = bench.problems.get("multi-fashion-mnist", data_root=tmp_path, train_samples=64)
    harness = bench.Bench(problem, bench.MAP, torch.device("cpu"))
    model = harness.branch(problem.make_model())
    assert len(bench.recon.branching.plan_of(model).layers) == 25
    assert harness.seconds_per_step(wanted[0]) > 0


@pytest.mark.parametrize(("minutes", "epochs"), [(10, 64), (1, 2), (0, 1), (1000, 120)])
def test_the_schedule_fits_the_time(minutes, epochs, bench, monkeypatch):
    """Two seeds of 1, 2, 2 and 3 hundredths of a second a step: 50 steps take 8 seconds an epoch in all."""
    costs = dict(zip(bench.variants(2, None), (0.01, 0.02, 0.02, 0.03), strict=True))

    class Harness:
        problem = type("Problem", (), {"make_loaders": staticmethod(lambda seed: (range(50), ()))})
        seconds_per_step = staticmethod(costs.__getitem__)

    monkeypatch.setattr(bench.time, "monotonic", lambda: 100.0)
    started = 60.0  # 40 seconds went by
    assert bench.epochs_that_fit(Harness(), list(costs), 60 * minutes, started) == epochs


def test_the_clock_times_the_steps_after_the_first(bench, monkeypatch):
    ticks = iter([5.0, 8.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    clock = bench.Clock(torch.device("cpu"))
    stops = [clock() for _ in range(bench.WARM_UP + bench.TIMED)]
    assert stops.index(True) == len(stops) - 1 and clock.seconds == 3.0


def test_mixed_precision_is_compared_with_a_run_without(bench):
    runs = {f"joint, {amp}, seed 0": {"accuracy": {"a": a, "b": 0.5}} for amp, a in (("bf16", 0.7), ("float32", 0.8))}
    line = bench.precision_line(bench.variants(1, "bf16"), runs)
    assert "60.00 %" in line and "65.00 %" in line and line.endswith("-5.00 points")
