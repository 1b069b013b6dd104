"""Files that the code of before wrote (tests/data/frozen/make.py) are read as they were written, and gone on from."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recon
from recon.errors import UsageError
from recon.experiments.run import Run
from recon.training.recorder import read_records
from tests.data.frozen import tiny

FROZEN = Path(__file__).parents[1] / "data" / "frozen"
SCORES = {"scale": 26, "stem": 26, "norm": 24, "mix": 24}
# Everything is in float64, but another machine or torch may add up in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def files(tmp_path):
    """A copy, its checkpoints uncompressed."""
    copy = shutil.copytree(FROZEN, tmp_path / "frozen", ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    return copy


def assert_same(model, expected):
    state, expected = model.state_dict(), load_file(expected)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, **CLOSE)


def test_a_map(tmp_path):
    cmap = recon.ConflictMap.load(FROZEN / "map.json")
    assert cmap.scores(-0.1) == SCORES and cmap.scores(-0.5) == {"scale": 10, "stem": 12, "norm": 9, "mix": 2}
    assert cmap.tasks == ("sum", "first", "spread") and cmap.steps == 18 and cmap.stage_steps == (4, 5, 4, 5)
    layer = cmap.layers[2]
    assert (layer.name, layer.shapes) == ("norm", {"weight": [6], "bias": [6]})
    assert layer.series.sum() == layer.conflicts.sum() == 24 and layer.observed.sum() == 18 * 3
    assert cmap.observed()["norm"] == dict.fromkeys(cmap.pairs, 18) and not cmap.has_floor and cmap.met is None
    assert cmap.ranking(by="rate") == cmap.ranking()
    with pytest.raises(UsageError, match=r"counts by task pair at S = -0\.1, not at -0\.3"):
        cmap.pair_scores(-0.3)
    cmap.save(tmp_path / "map.json")
    new, old = (json.loads(path.read_text()) for path in (tmp_path / "map.json", FROZEN / "map.json"))
    assert (new["version"], old["version"]) == (3, 2)
    for of_new, of_old in [(new, old), *zip(new["layers"], old["layers"], strict=True)]:
        assert {key: of_new[key] for key in of_old if key not in ("version", "layers")} == {
            key: value for key, value in of_old.items() if key not in ("version", "layers")
        }
    recon.ConflictMap.load(tmp_path / "map.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "map.json").read_bytes()


def test_a_map_with_a_floor(tmp_path):
    """Of the same training."""
    cmap, before = (recon.ConflictMap.load(FROZEN / name) for name in ("map_with_floor.json", "map.json"))
    assert cmap.scores(-0.1) == before.scores(-0.1) == SCORES and cmap.scores(by="rate") == before.scores(by="rate")
    assert cmap.thresholds == (-0.3, -0.2, -0.15, -0.1, -0.05, 0.0) and cmap.met.tolist() == [[1, 1, 1]] * 18
    assert list(cmap.pair_scores()["mix"].values()) == [8, 7, 9] and list(cmap.pair_scores(-0.3)["mix"].values()) == [
        3,
        6,
        0,
    ]
    assert cmap.floor()["mix"] == pytest.approx({"sum": 0, "first": 1 / 6, "spread": 0})
    assert cmap.across()["mix"] == pytest.approx(dict(zip(cmap.pairs, (4 / 12, 7 / 12, 6 / 12), strict=True)))
    excess = (8 / 18 - 1 / 6 + 7 / 18 + 9 / 18 - 1 / 6) / 3
    assert cmap.scores(by="excess")["mix"] == pytest.approx(excess)
    cmap.save(tmp_path / "map.json")
    assert (tmp_path / "map.json").read_bytes() == (FROZEN / "map_with_floor.json").read_bytes()


@pytest.mark.parametrize("name", ["saved", "rotated"])
def test_a_saved_model(name):
    loaded = recon.load(FROZEN / name, tiny.Tiny())
    assert_same(loaded, FROZEN / name / "weights.safetensors")
    check_outputs(loaded, name)


def check_outputs(model, name):
    expected = json.loads((FROZEN / "expected.json").read_text())[name]
    outputs = model.eval()(tiny.inputs(8))
    for task, output in expected.items():
        torch.testing.assert_close(outputs[task].detach(), torch.tensor(output, dtype=torch.float64), **CLOSE)


def test_a_conversion(ask):
    assert Run.load("branched").surgery == "Recon K=2"
    assert set(ask("evaluate tiny.py:problem --model branched")["results"]) == set(tiny.LOSSES)


def test_runs(ask, command):
    compared = ask("compare runs/joint runs/pcgrad runs/single")
    deltas = {row["name"]: row["delta_m"] for row in compared["rows"]}
    assert deltas == pytest.approx({"runs/joint": -25.1960015, "runs/pcgrad": -17.0357134, "runs/single": 0})
    for folder in ("joint", "joint/best", "pcgrad"):
        run = Run.load(f"runs/{folder}")
        found = ask(f"evaluate tiny.py:problem --model runs/{folder}")["results"]
        for task, metrics in run.results.items():
            assert found[task] == pytest.approx(metrics, rel=1e-5)
    records = read_records("runs/pcgrad/metrics.jsonl")  # of 12 steps and 2 epochs
    assert len(records) == 14 and set(records[0]["losses"]) == set(tiny.LOSSES)
    code, _, err = command("train tiny.py:problem --epochs 2 --out runs/joint --resume --device cpu")
    assert code == 0 and "is finished; there is nothing to resume" in err


def test_a_bench(ask):
    then = json.loads(Path("bench/results.json").read_text())
    size = "--epochs 2 --profile-epochs 1 --seeds 1 --workers 1 --top-k 2"
    now = ask(f"bench tiny.py:problem --methods joint --controls none {size} --device cpu --out bench")
    assert now["finished"] and now["seconds_per_step"] == then["seconds_per_step"]  # nothing was trained or timed
    for new, old in zip(now["rows"], then["rows"], strict=True):
        assert {name: new[name] for name in old} == old
    assert now["cosines"] == then["cosines"]


# A training goes on under the options that its optimizer and schedule had: other versions of torch name others.
same_optimizers = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="the frozen trainings' optimizers have options that this torch does not know"
)


@same_optimizers
@pytest.mark.parametrize("kind", ["joint", "gradnorm", "profile"])
def test_a_checkpoint(kind, files, tmp_path):
    steps = []
    model, found = tiny.train(kind, files / f"{kind}.checkpoint", resume=True, stop=lambda: steps.append(1))
    assert len(steps) == 18 - tiny.THIRD
    assert_same(model, FROZEN / f"{kind}.safetensors")
    if kind == "profile":
        whole = recon.ConflictMap.load(FROZEN / "profile.json")
        assert found.scores(-0.1) == whole.scores(-0.1)
        for layer, expected in zip(found.layers, whole.layers, strict=True):
            assert layer.conflicts.tolist() == expected.conflicts.tolist()
            assert layer.histogram.tolist() == expected.histogram.tolist()


@same_optimizers
def test_a_run_that_was_interrupted(ask):
    ask("train tiny.py:problem --method uw --model branched --device cpu --out runs/interrupted --resume")
    assert_same(recon.load("runs/interrupted", tiny.Tiny()), FROZEN / "interrupted.safetensors")
    run = Run.load("runs/interrupted")
    assert run.finished and [epoch["number"] for epoch in run.history] == [1, 2, 3]
    assert len(read_records("runs/interrupted/metrics.jsonl")) == 18 + 3
