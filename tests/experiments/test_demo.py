import json
import re

import pytest

import recon
from recon.problems.sets import digits
from recon_cli.main import main


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(digits, "TRAIN_PAIRS", 640)
    monkeypatch.setattr(digits, "TEST_PAIRS", 200)


def test_the_demo_tells_the_whole_story(tmp_path, capsys, few_digits):
    assert (
        main(["demo", "--seeds", "1", "--epochs", "1", "--top-k", "3", "--workers", "1", "--out", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    labels = ["single-task", "joint", "pcgrad", "joint + Recon K=3", "pcgrad + Recon K=3", "joint + random K=3"]
    table = {label: re.search(rf"^{re.escape(label)}  .*$", out, re.MULTILINE) for label in labels}
    assert all(table.values()), out
    for column in ("top_left accuracy", "bottom_right accuracy", "mean accuracy", "Δm %", "multiply-adds", "ms/step"):
        assert column in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == labels
    by_name = {row["name"]: row for row in results["rows"]}
    assert by_name["single-task"]["delta_m"] == 0
    assert by_name["joint + Recon K=3"]["parameters_ratio"] > 1
    assert all(row["seconds_per_step"] > 0 and 0 < row["mean"] < 1 for row in results["rows"])
    shares = results["conflicting_steps"]
    assert set(shares["after"]).isdisjoint(results["branched_layers"]) and len(shares["after"]) == 15
    assert set(shares["after"]) < set(shares["before"])
    for picture in ("conflicts_by_layer.png", "conflicts_before_after.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    cmap = recon.ConflictMap.load(tmp_path / "map.json")
    assert (
        cmap.steps == 15
        and list(recon.plan(cmap, digits.digits().make_model(), top_k=3).layers) == (results["branched_layers"])
    )
    branched = recon.load(tmp_path / "branched", digits.digits().make_model())
    assert list(branched.branch_plan.layers) == results["branched_layers"]


def test_an_interrupted_demo_goes_on_and_other_settings_are_another_demo(tmp_path, capsys, few_digits, monkeypatch):
    line = ["demo", "--seeds", "1", "--epochs", "1", "--top-k", "3", "--workers", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("recon.experiments.bench.bench.time_steps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(line) == 1
    assert "Go on with the same command:\n  recon demo --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["runs"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/run.json")}
    assert main(line) == 0 and len(before) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    line[line.index("--epochs") + 1] = "2"
    monkeypatch.setattr(
        "recon.experiments.bench.bench.time_steps", lambda problem, variants, *_: {v.label: 1.0 for v in variants}
    )
    assert main(line) == 0
    assert json.loads((tmp_path / "results.json").read_text())["epochs"] == 2


@pytest.mark.slow
def test_the_demos_numbers_are_those_of_the_same_training_by_hand(tmp_path, few_digits):
    main(["demo", "--seeds", "1", "--epochs", "1", "--top-k", "3", "--workers", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    problem = digits.digits()
    loaded = recon.load(tmp_path / "branched", problem.make_model())
    measured = recon.evaluate(loaded, problem.make_loaders(0)[1], problem.tasks)
    other = tmp_path / "other"
    main(["demo", "--seeds", "1", "--epochs", "1", "--top-k", "3", "--workers", "1", "--out", str(other)])
    again = json.loads((other / "results.json").read_text())
    assert again["results_by_seed"] == results["results_by_seed"]
    assert measured == results["results_by_seed"]["pcgrad + Recon K=3"][0]


@pytest.mark.parametrize("options", [["--top-k", "99"], ["--seeds", "0"], ["--epochs", "x"], ["--out", "/dev/null/x"]])
def test_wrong_options(options, capsys, tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
