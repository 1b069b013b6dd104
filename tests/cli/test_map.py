import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recon
from recon_cli.main import _parse
from tests.maps.test_conflict_map import make_map, score_map, with_series
from tests.maps.test_published import PUBLISHED, SCORES, as_log, random_cosines

ACTIONS = ("show", "compare", "merge", "import")
LAYERS = ("stem", "norm", "mix", "last")

PROBLEM = """
import torch
from torch import nn
from torch.nn.functional import mse_loss

from recon.problems.problem import Problem, Task
from recon.problems.loading import TensorBatches, in_order, shuffled

TASKS = ("up", "down", "mean")


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.mix, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.mix(self.norm(self.stem(x)).relu()).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})

    def forward(self, x):
        x = self.backbone(x)
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def data(seed):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(seed))
    return TensorBatches(x, {task: x[:, i] for i, task in enumerate(TASKS)})


def make_loaders(seed):
    return shuffled(data(0), 16, seed), in_order(data(1), 16)


def problem():
    return Problem("three", [Task(task, mse_loss) for task in TASKS], Net, make_loaders, epochs=1)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    (folder / "three.py").write_text(PROBLEM)
    (folder / "plain_file").write_text("not a folder")
    for seed in range(3):
        made = with_series(make_map(layers=LAYERS, seed=seed, steps=40))
        made.made_by = {"problem": "toy", "seed": seed}
        made.save(folder / f"seed{seed}.json")
    inside = make_map(layers=[f"backbone.{name}" for name in LAYERS])
    for layer in inside.layers:
        layer.shapes = {"weight": [3, 3], "bias": [3]} if "norm" not in layer.name else {"weight": [3], "bias": [3]}
    inside.save(folder / "inside.json")
    make_map(layers=LAYERS, tasks=("a", "b", "c"), threshold=-0.2).save(folder / "other.json")
    make_map(layers=("gone", *(f"backbone.{name}" for name in LAYERS))).save(folder / "partial.json")
    score_map({"backbone.mix": 5, "backbone.stem": 3, "backbone.last": 3}).save(folder / "imported.json")
    (folder / "scores.json").write_text(json.dumps(SCORES))
    (folder / "scores_S-0.1.json").write_text(json.dumps(SCORES))
    (folder / "list.json").write_text('["bn1"]')
    torch.save(as_log(random_cosines()), folder / "cos.pt")
    return folder


def load(path):
    return recon.ConflictMap.load(path)


@pytest.mark.parametrize("action", ["", *ACTIONS])
def test_every_action_has_examples_that_its_parser_takes(command, action):
    code, out, _ = command(f"map {action} --help")
    assert code == 0
    examples = re.findall(r"^  (recon .*)$", out.partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        assert _parse(example.split()[1:]) is not None, example


def test_help_and_maps_come_without_torch_and_at_once(files):
    lines = [["map"], ["map", "--help"], *(["map", action, "--help"] for action in ACTIONS)]
    lines += [["map", "show", "seed0.json"], ["map", "compare", "seed0.json", "seed1.json"]]
    lines += [["map", "merge", "seed0.json", "seed1.json", "--out", "late.json"]]
    lines += [["map", "import", "scores.json", "--threshold", "-0.1", "--out", "late.json"]]
    code = f"""
import sys
from recon_cli.main import main
for line in {lines}:
    main(line)
    assert "torch" not in sys.modules, line
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=files)
    os.remove(files / "late.json")


@pytest.mark.parametrize(
    "line", ["map --json show seed0.json", "map show --json seed0.json", "map show seed0.json --json"]
)
def test_json_may_be_asked_for_anywhere(command, line):
    code, out, _ = command(line)
    assert code == 0 and json.loads(out)["steps"] == 40


def test_show_tells_what_is_not_known(command, ask):
    code, out, _ = command("map show imported.json")
    assert code == 0
    assert "tasks:     unknown" in out and "steps:     unknown" in out
    first = next(line for line in out.splitlines() if line.startswith("1 "))
    assert first.split()[:2] == ["1", "backbone.mix"] and first.split()[-5:] == ["-"] * 5 and "5" in first.split()
    found = ask("map show imported.json")
    assert (found["tasks"], found["steps"], found["skipped"]) == ([], None, None)
    assert found["layers"][0]["share"] is None and found["layers"][0]["parameters"] is None
    assert ask("map show imported.json --threshold -0.1")["layers"] == found["layers"]


def test_compare_agrees_with_the_library(files, command, ask):
    found = ask("map compare seed0.json seed1.json --top-k 2")
    expected = load(files / "seed0.json").compare(load(files / "seed1.json"), top_k=2)
    assert (found["spearman"], found["kendall"]) == (expected.spearman, expected.kendall)
    assert (found["mean_rank_shift"], found["jaccard"]) == (expected.mean_shift, expected.jaccard)
    assert (found["top_k"], found["overlap"], found["common"]) == (2, list(expected.overlap), 4)
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in expected.layers]
    assert [layer["ranks"] for layer in found["layers"]] == [list(layer.ranks) for layer in expected.layers]
    assert [of["made_by"]["seed"] for of in found["maps"]] == [0, 1]
    code, out, err = command("map compare seed0.json seed1.json --top-k 2 --top 3")
    assert (code, err) == (0, "")
    assert f"Spearman {expected.spearman:.3f}, Kendall {expected.kendall:.3f}" in out
    for words in ("seed0.json", "seed1.json", "Layers in common: 4", "Jaccard", "Δrank", "share A", "... and 1 more"):
        assert words in out
    assert re.search(r"^seed +0 +1$", out, re.MULTILINE)


def test_compare_maps_made_differently(files, command, ask):
    found = ask("map compare seed0.json other.json")
    assert [of["tasks"] for of in found["maps"]] == [["a", "b"], ["a", "b", "c"]]
    assert [of["threshold"] for of in found["maps"]] == [-0.1, -0.2]
    assert {of["threshold"] for of in ask("map compare seed0.json other.json --threshold -0.5")["maps"]} == {-0.5}
    scores = load(files / "seed0.json").scores(-0.5)
    at_another = ask("map compare seed0.json other.json --threshold -0.5")["layers"]
    assert {layer["name"]: layer["scores"][0] for layer in at_another} == scores
    found = ask("map compare partial.json imported.json")
    assert [of["only"] for of in found["maps"]] == [["gone", "backbone.norm"], []]
    code, out, _ = command("map compare partial.json imported.json")
    assert code == 0 and "2 in A alone (gone, backbone.norm)" in out and "share A" in out and "score B" in out


def test_compare_renames_the_second_map(ask):
    found = ask("map compare seed0.json inside.json --rename backbone=")
    assert {layer["name"] for layer in found["layers"]} == set(LAYERS)
    found = ask("map compare inside.json seed0.json --rename =backbone")
    assert {layer["name"] for layer in found["layers"]} == {f"backbone.{name}" for name in LAYERS}


def test_a_map_compared_with_itself(ask):
    found = ask("map compare seed0.json seed0.json")
    assert (found["spearman"], found["kendall"], found["mean_rank_shift"], found["jaccard"]) == (
        pytest.approx(1),
        pytest.approx(1),
        0,
        1,
    )


def test_merge_adds_up(files, command, ask, tmp_path):
    names = [f"seed{seed}.json" for seed in range(3)]
    found = ask("map merge", *names, "--out", tmp_path / "all.json")
    merged, maps = load(tmp_path / "all.json"), [load(files / name) for name in names]
    assert merged.scores() == {name: sum(cmap.scores()[name] for cmap in maps) for name in LAYERS}
    assert found["steps"] == merged.steps == 120
    assert merged.made_by == {"problem": "toy", "merged": [{"map": name, "seed": i} for i, name in enumerate(names)]}
    assert [layer["name"] for layer in found["layers"]] == merged.ranking()
    code, out, _ = command("map show", tmp_path / "all.json")
    assert code == 0 and "problem toy, merged seed0.json (seed 0), seed1.json (seed 1)" in " ".join(out.split())
    code, out, _ = command("map merge", *names, "--out", tmp_path / "all.json")  # an older map may be replaced
    assert code == 0 and f"Saved {tmp_path / 'all.json'}" in out


def test_import_scores(command, ask, tmp_path):
    out = tmp_path / "map.json"
    found = ask("map import scores.json --threshold -0.1 --out", out)
    assert load(out).scores() == SCORES
    assert [(layer["name"], layer["score"]) for layer in found["layers"]] == list(SCORES.items())
    code, text, _ = command("map import scores_S-0.1.json --threshold -0.1 --tasks left,right --out", out)
    assert code == 0 and "4 shared layers, an unknown number of steps" in text and "bn1" in text
    assert load(out).tasks == ("left", "right")


def test_import_a_log(ask, tmp_path):
    out = tmp_path / "map.json"
    found = ask("map import cos.pt --threshold -0.3 --tasks a,b,c --out", out)
    assert (found["steps"], found["tasks"], found["threshold"]) == (50, ["a", "b", "c"], -0.3)
    expected = {name: int((rows < -0.3).sum()) for name, rows in random_cosines().items()}
    assert load(out).scores() == expected
    assert ask("map show", out, "--threshold", "-0.1")["layers"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published score files in ../shared/data")
def test_the_published_maps_of_two_data_sets_rank_alike(ask, tmp_path):
    for name, threshold in (("cityscapes-segnet-S0.0.json", 0), ("nyuv2-mtan-S-0.02.json", -0.02)):
        ask("map import", PUBLISHED / name, "--threshold", threshold, "--out", tmp_path / name)
    found = ask("map compare", *(tmp_path / name for name in ("cityscapes-segnet-S0.0.json", "nyuv2-mtan-S-0.02.json")))
    assert found["common"] == 52 and [len(of["only"]) for of in found["maps"]] == [0, 20]
    assert found["spearman"] > 0.9 and found["top_k"] == 13 and len(found["overlap"]) > 9


def test_convert_takes_a_map_of_other_tasks_and_says_so(files, command, ask, tmp_path):
    out = ask("convert three.py:problem --map inside.json --top-k 2 --no-verify --out", tmp_path / "a")
    assert set(out["branched_layers"]) == set(load(files / "inside.json").ranking()[:2])
    assert out["map"] == {
        "file": "inside.json",
        "tasks": ["a", "b"],
        "matched": [f"backbone.{name}" for name in LAYERS],
        "missing": [],
        "changed": ["backbone.stem"],
    }
    problem = recon.problems.get(f"{files / 'three.py'}:problem")
    assert recon.load(tmp_path / "a", problem.make_model()).branch_plan.tasks == ("up", "down", "mean")
    code, text, err = command("convert three.py:problem --map inside.json --top-k 2 --no-verify --out", tmp_path / "b")
    assert code == 0
    assert "Map inside.json, made for the tasks a, b: 4 layers matched, 0 missing from the model, 1 with other" in text
    assert "note: The map was made for the tasks a, b; the copies are for up, down, mean." in err
    assert "note: 1 of the 4 matched layers have other parameter shapes" in err and "backbone.stem" in err


def test_convert_goes_on_with_the_layers_that_match(files, command, ask, tmp_path):
    code, _, err = command("convert three.py:problem --map partial.json --top-k 1 --no-verify --out", tmp_path / "a")
    assert code == 0 and "note: 1 of the map's 5 layers are not in this model (gone)" in err
    out = ask("convert three.py:problem --map partial.json --top-k 4 --no-verify --out", tmp_path / "b")
    assert out["map"]["missing"] == ["gone"]
    assert out["branched_layers"] == out["map"]["matched"] == [f"backbone.{name}" for name in LAYERS]


def test_convert_renames_the_map_s_layers(command, ask, tmp_path):
    line = "convert three.py:problem --map seed0.json --top-k 1 --no-verify --out"
    code, _, err = command(line, tmp_path / "a")
    assert code == 2 and "none of its 4 layers" in err and "--rename '=backbone'" in err
    assert len(ask(line, tmp_path / "a", "--rename", "=backbone")["map"]["matched"]) == 4
    more = ("--rename", "stem=backbone.stem", "--rename", "mix=backbone.mix")
    assert ask(line, tmp_path / "b", *more)["map"]["matched"] == ["backbone.stem", "backbone.mix"]


def test_convert_takes_an_imported_map(command, ask, tmp_path):
    line = "convert three.py:problem --map imported.json --no-verify --out"
    out = ask(line, tmp_path / "a", "--top-k", 2)
    assert out["branched_layers"] == ["backbone.stem", "backbone.mix"]  # stem and last tie: the model's order counts
    assert out["map"]["tasks"] == []
    code, _, err = command(line, tmp_path / "b", "--top-k", 1)
    assert code == 0 and "made for tasks that it does not name" in err
    assert ask(line, tmp_path / "c", "--layers", "backbone.norm")["branched_layers"] == ["backbone.norm"]
    code, _, err = command(line, tmp_path / "d", "--top-k", 1, "--threshold", "-0.2")
    assert code == 2 and "only its scores at S=-0.1" in err and not (tmp_path / "d").exists()


WRONG = {
    "no action": ("map", "ACTION"),
    "mistyped action": ("map comapre seed0.json seed1.json", "'compare'"),
    "mistyped option": ("map compare seed0.json seed1.json --topk 3", "did you mean '--top-k'"),
    "option of another action": ("map show seed0.json --out new.json", "--out"),
    "show: no map": ("map show", "MAP"),
    "show: scores": ("map show scores.json", "recon map import"),
    "show: another S of imported scores": ("map show imported.json --threshold -0.2", "only its scores at S=-0.1"),
    "show: plot of imported scores": ("map show imported.json --plot new.png", "no counts by quarter"),
    "compare: one map": ("map compare seed0.json", "B"),
    "compare: missing": ("map compare seed0.json nope.json", "nope.json: there is no such file"),
    "compare: nothing in common": ("map compare seed0.json inside.json", "--rename 'backbone='"),
    "compare: K too large": ("map compare seed0.json seed1.json --top-k 5", "between 1 and 4"),
    "compare: K too small": ("map compare seed0.json seed1.json --top-k 0", "at least 1"),
    "compare: another S of imported scores": (
        "map compare inside.json imported.json --threshold 0",
        "only its scores at S=-0.1",
    ),
    "compare: threshold": ("map compare seed0.json seed1.json --threshold 0.5", "multiple of 0.01"),
    "compare: rename without =": ("map compare seed0.json inside.json --rename backbone", "OLD=NEW"),
    "compare: rename to the same": ("map compare seed0.json inside.json --rename a=a", "OLD=NEW"),
    "compare: rename with two =": ("map compare seed0.json inside.json --rename a=b=c", "OLD=NEW"),
    "compare: rename to nothing": ("map compare seed0.json inside.json --rename =", "OLD=NEW"),
    "compare: rename twice": (
        "map compare seed0.json inside.json --rename backbone= --rename backbone=x",
        "two new names",
    ),
    "compare: rename hits nothing": ("map compare seed0.json inside.json --rename bakbone=", "'backbone'"),
    "merge: one map": ("map merge seed0.json --out new.json", "two or more"),
    "merge: no out": ("map merge seed0.json seed1.json", "--out"),
    "merge: the same twice": ("map merge seed0.json seed1.json seed0.json --out new.json", "exactly the same counts"),
    "merge: other tasks": ("map merge seed0.json other.json --out new.json", "its tasks are a, b, c"),
    "merge: other layers": ("map merge seed0.json inside.json --out new.json", "it lacks stem, norm, mix, last"),
    "merge: onto a source": ("map merge seed0.json seed1.json --out seed1.json", "one of the maps to merge"),
    "merge: out is another file": ("map merge seed0.json seed1.json --out three.py", "holds something else"),
    "merge: out below a file": ("map merge seed0.json seed1.json --out plain_file/new", "plain_file is not a folder"),
    "merge: no map": ("map merge seed0.json plain_file --out new.json", "not whole JSON"),
    "import: no threshold": ("map import scores.json --out new.json", "--threshold"),
    "import: threshold off the grid": ("map import scores.json --threshold -0.105 --out new.json", "multiple of 0.01"),
    "import: not the file's threshold": (
        "map import scores_S-0.1.json --threshold -0.2 --out new.json",
        "S=-0.1, not -0.2",
    ),
    "import: no out": ("map import scores.json --threshold -0.1", "--out"),
    "import: onto itself": ("map import scores.json --threshold -0.1 --out scores.json", "holds something else"),
    "import: out is a folder": ("map import scores.json --threshold -0.1 --out .", "it is a folder"),
    "import: missing": ("map import nope.json --threshold -0.1 --out new.json", "there is no such file"),
    "import: a list": ("map import list.json --threshold -0.1 --out new.json", "holds a list, not one"),
    "import: a map": ("map import seed0.json --threshold -0.1 --out new.json", "is a conflict map already"),
    "import: one task": ("map import cos.pt --threshold -0.1 --tasks a --out new.json", "two or more different tasks"),
    "import: a task twice": (
        "map import cos.pt --threshold -0.1 --tasks a,a --out new.json",
        "two or more different tasks",
    ),
    "import: wrong tasks": ("map import cos.pt --threshold -0.1 --tasks a,b --out new.json", "cosines of 3 tasks"),
    "convert: rename without a map": (
        "convert three.py:problem --layers x --rename a=b --out new",
        "--rename goes with",
    ),
    "convert: no match": ("convert three.py:problem --map seed0.json --top-k 1 --out new", "--rename '=backbone'"),
    "convert: K too large": (
        "convert three.py:problem --map partial.json --top-k 5 --out new",
        "the map has 4 shared layers of this model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_a_message(refused, case):
    refused(*WRONG[case])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files, root or not")
@pytest.mark.parametrize("line", ["merge seed0.json seed1.json", "import scores.json --threshold -0.1"])
def test_a_folder_that_takes_no_files_is_refused(command, line):
    code, _, err = command(f"map {line} --out /proc/nowhere/out.json")
    assert code == 2 and "No file can be made in" in err
