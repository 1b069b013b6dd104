"""Which pairs of tasks conflict, on the command line: what was never measured, nothing at all, and who fights whom."""

import matplotlib.image
import numpy as np
import pytest

import recon
from tests.maps.from_cosines import map_of, random_cosines, random_floors
from tests.maps.test_conflict_map import score_map
from tests.plans.test_right_pairs import FIGHTS, NOISY, QUIET, SEPARATE

PROBLEM = """
import torch
from torch import nn
from torch.nn.functional import mse_loss

from recon.problems.loading import TensorBatches, in_order
from recon.problems.problem import Problem, Task


class Net(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.x, self.y, self.z = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in tasks})
        for head in self.heads.values():
            head.load_state_dict(self.heads["a"].state_dict())

    def forward(self, inputs):
        inputs = self.z(self.y(self.x(inputs)))
        return {task: head(inputs).squeeze(1) for task, head in self.heads.items()}


def make(tasks):
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    batches = TensorBatches(data, {task: data.sum(1) for task in tasks})
    return Problem(
        "same", [Task(task, mse_loss) for task in tasks], lambda: Net(tasks), lambda seed: (in_order(batches, 8),) * 2,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3), epochs=1,
        example_inputs=lambda: torch.zeros(2, 4),
    )


def two():
    return make("ab")


def three():
    return make("abc")
"""

TASKS = ("a", "b", "c", "d")
MANY = tuple(f"task{i}" for i in range(10))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "same.py").write_text(PROBLEM)
    maps = {"quiet": QUIET, "separate": SEPARATE, "fights": FIGHTS, "noisy": NOISY}
    for name, cmap in maps.items():
        cmap.save(folder / f"{name}.json")
    score_map({"x": 3, "y": 2}, tasks=("a", "b")).save(folder / "imported.json")
    cosines, floors = random_cosines(("x", "y"), TASKS, 40), random_floors(("x", "y"), TASKS, 20)
    map_of(cosines, TASKS, floors=floors).save(folder / "four.json")
    map_of(random_cosines(("x", "y"), MANY, 40), MANY).save(folder / "many.json")
    return folder


# Nothing where nothing is.


def test_a_profile_without_a_conflict_says_that_there_is_nothing_to_branch(command, ask, files):
    code, text, _ = command("profile same.py:two --epochs 1 --out same.json")
    assert code == 0 and "There is nothing to branch: no two tasks had a cosine below -0.1" in text
    assert "Next" not in text and "convert" not in text
    assert ask("profile same.py:two --epochs 1 --out same.json")["conflict"] is False
    assert set(recon.ConflictMap.load(files / "same.json").scores().values()) == {0}


@pytest.mark.parametrize("way", ["--top-k 1", "--share 0.5", "--max-params 3", "--auto", "--top-k 1 --by rate"])
@pytest.mark.parametrize("verb", ["plan", "convert"])
def test_a_map_without_a_conflict_is_no_reason_to_branch(refused, verb, way):
    out = " --out new" if verb == "convert" else ""
    refused(f"{verb} same.py:three --map quiet.json {way}{out}", "so there is nothing to branch")


def test_named_layers_are_branched_all_the_same(ask):
    out = ask("plan same.py:three --map quiet.json --layers y z --exclude z")
    assert [layer["name"] for layer in out["layers"]] == ["y"] and out["covered"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "no two tasks had a cosine below -0.1 in any"),
        ("--tasks a,b", "a and b never had a cosine below -0.1 in any"),
        ("--by rate", "no two tasks had a cosine below -0.1 in any"),
    ],
)
def test_a_map_without_a_conflict_says_so_and_draws_no_line(command, ask, options, said):
    _, text, _ = command(f"map show quiet.json {options}")
    assert f"There is nothing to branch: {said} shared layer." in text
    assert "in top" not in text and "Within noise" not in text and "~" not in text
    assert ask(f"map show quiet.json {options}")["conflict"] is False
    assert "nothing to branch" not in command("map show fights.json")[1]
    assert ask("map show fights.json")["conflict"] is True


def test_the_legend_of_the_excess_adds_up(command, ask):
    """By the rule in it, a map's own numbers of a layer give its excess."""
    _, text, _ = command("map show noisy.json")
    assert "excess: each pair's rate less the larger floor of its two tasks, at least 0, the mean" in text
    cmap = recon.ConflictMap.load("noisy.json")
    floors, rates = cmap.floor(), cmap.pair_scores()
    for layer in ask("map show noisy.json")["layers"]:
        name = layer["name"]
        seen, own = cmap.observed()[name], floors[name]
        each = [max(0, rates[name][pair] / seen[pair] - max(own[task] for task in pair)) for pair in seen]
        assert layer["excess"] == pytest.approx(sum(each) / len(each), abs=1e-9)


# What one task alone uses.


@pytest.mark.parametrize("map_option", ["", " --map fights.json"])
def test_layers_of_one_task_are_named(command, ask, map_option):
    note = "heads.a: used by task a alone, so the other tasks' copies are never trained."
    line = f"plan same.py:three{map_option} --layers y heads.a"
    code, _, err = command(line)
    assert code == 0 and f"note: {note}" in err and "y: used" not in err
    assert note in ask(line)["notes"]


# One layer, not one layers.


def test_one_layer_is_no_layers(command, files):
    score_map({"x": 3}, tasks=("a", "b")).save(files / "one.json")
    _, text, _ = command("plan same.py:two --map one.json --top-k 1")
    assert "1 layer matched" in text and "1 of 1 shared layer:" in text and "1 layers" not in text
    _, text, _ = command("convert same.py:two --layers x --out one")
    assert "Branched: 1 layer: named" in text
    (files / "published.json").write_text('{"x": 3}')
    _, text, _ = command("map import published.json --threshold -0.1 --out read.json")
    assert "1 shared layer, an unknown number of steps" in text


# What was never measured, and by what layers are chosen.


def test_a_plan_names_the_pairs_that_never_met(command, ask):
    line = "plan same.py:three --map separate.json --top-k 1 --groups"
    code, text, notes = command(f"{line} a+c b")
    assert code == 0
    assert "note: a-c, b-c never met in a step of the profile" in notes and "keep a-c together" in notes
    assert "Conflict covered: 55.0 % of what was measured; never measured: a-c, b-c." in text
    out = ask(f"{line} 2")
    assert out["never_met"] == [["a", "c"], ["b", "c"]] and len(out["notes"]) == 1
    assert out["layers"][0]["groups"] == [["a", "b"], ["c"]]


def test_a_plan_for_some_of_the_maps_tasks(ask):
    assert [layer["name"] for layer in ask("plan same.py:three --map fights.json --top-k 1")["layers"]] == ["x"]
    out = ask("plan same.py:two --map fights.json --top-k 1")
    assert [(layer["name"], layer["score"], layer["share"]) for layer in out["layers"]] == [("y", 40, 0.8)]


def test_a_choice_among_some_layers(command, ask):
    line = "plan same.py:three --map fights.json"
    for options, names, surgery in (
        ("--top-k 1 --exclude x", ["y"], "Recon K=1, without x"),
        ("--top-k 1 --layers y z", ["y"], "Recon K=1, among y z"),
        ("--top-k 1 --matching [yz] --by rate", ["y"], "Recon K=1 by rate, among [yz]"),
        ("--share 0.9 --exclude x", ["y", "z"], "share=0.9, without x"),
        ("--top-k 1 --units [xy]", ["x", "y"], "Recon K=1, units [xy]"),
    ):
        out = ask(f"{line} {options}")
        assert [layer["name"] for layer in out["layers"]] == names
        assert out["surgery"] == surgery
        _, text, _ = command(f"{line} {options}")
        assert options.split()[-1] in text.splitlines()[-1]
        assert command(f"convert {line[5:]} {options} --out {surgery.replace(' ', '_')}")[0] == 0


def test_auto_prints_which_layers_are_conflict_and_which_noise(command, ask):
    line = "plan same.py:two --map noisy.json --auto"
    out = ask(line)
    assert out["by"] == "excess" and [layer["name"] for layer in out["layers"]] == ["y"]
    assert {of["name"]: of["verdict"] for of in out["evidence"]} == {"x": "unsure", "y": "conflict", "z": "noise"}
    _, text, _ = command(line)
    assert "Conflict above the noise floor covered:" in text
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith(("x ", "y ", "z "))}
    assert rows == {"x": "unsure", "y": "conflict", "z": "noise"}
    assert not ask("plan same.py:three --map fights.json --top-k 1")["evidence"]


# Who fights whom.


def test_the_pairs_of_a_map(command, ask):
    cmap = FIGHTS
    out = ask("map show fights.json --pairs")
    assert out["layer"] is None and [row["tasks"] for row in out["pairs"]] == [["a", "c"], ["b", "c"], ["a", "b"]]
    assert {tuple(row["tasks"]): row["rate"] for row in out["pairs"]} == {
        ("a", "b"): 50 / 150,
        ("a", "c"): 60 / 150,
        ("b", "c"): 60 / 150,
    }
    of_x = {tuple(row["tasks"]): (row["rate"], row["met"]) for row in ask("map show fights.json --pairs x")["pairs"]}
    assert of_x == {pair: (count / 50, 50) for pair, count in cmap.pair_scores()["x"].items()}
    _, text, _ = command("map show fights.json --pairs y")
    assert "layer:     y" in text and "80.0% of 50" in text


def test_pairs_that_never_met_are_shown_as_such(command, ask):
    code, text, _ = command("map show separate.json --pairs")
    assert code == 0 and text.count("never met") == 4 and "33.3% of 30" in text
    rows = ask("map show separate.json --pairs")["pairs"]
    assert rows[0]["tasks"] == ["a", "b"] and rows[-1]["rate"] is None and rows[-1]["met"] == 0
    _, text, _ = command("map show separate.json")
    assert "Never met in a step, so nothing is known of their conflict: a-c, b-c." in text


def test_the_noise_floor_of_a_map(command, ask, files):
    cmap = recon.ConflictMap.load(files / "four.json")
    shown = {layer["name"]: layer for layer in ask("map show four.json --by excess")["layers"]}
    for name in ("x", "y"):
        assert shown[name]["score"] == shown[name]["excess"] == cmap.scores(by="excess")[name]
        assert shown[name]["rate"] == cmap.scores(by="rate")[name]
        assert shown[name]["floor"] == pytest.approx(np.mean(list(cmap.floor()[name].values())))
    _, text, _ = command("map show four.json")
    header = next(line for line in text.splitlines() if line.startswith("rank"))
    assert [word for word in header.split() if word in ("share", "rate", "floor", "excess")] == [
        "share",
        "rate",
        "floor",
        "excess",
    ]
    assert "floor: how often a task conflicts with itself" in text
    own = ask("map show four.json --pairs x")["own"]
    assert own == cmap.floor()["x"]
    _, text, _ = command("map show four.json --pairs x")
    assert f"({100 * own['a']:.1f}%)" in text


def test_some_tasks_of_a_map(ask, files):
    cmap = recon.ConflictMap.load(files / "four.json")
    for by in ("count", "rate", "excess"):
        out = ask(f"map show four.json --tasks b,d --by {by}")
        assert {layer["name"]: layer["score"] for layer in out["layers"]} == cmap.scores(tasks=("b", "d"), by=by)
        assert all("interval" in layer for layer in out["layers"]) and out["tasks"] == ["b", "d"]
    assert [row["tasks"] for row in ask("map show four.json --tasks b,d --pairs")["pairs"]] == [["b", "d"]]


def test_many_tasks_are_listed_pair_by_pair(command):
    code, text, _ = command("map show many.json --pairs --top 5")
    assert code == 0 and "... and 40 more" in text
    rates = [
        float(line.split()[2].rstrip("%")) for line in text.splitlines() if line.startswith("task") and "%" in line
    ]
    assert len(rates) == 5 and rates == sorted(rates, reverse=True)


def test_the_pairs_as_a_picture(ask, files):
    assert ask("map show four.json --pairs --picture all.png")["picture"] == "all.png"
    ask("map show four.json --pairs x --picture x.png")
    whole, one = (matplotlib.image.imread(files / name) for name in ("all.png", "x.png"))
    assert whole.shape[1] > one.shape[1] and one.std() > 0


def test_maps_are_compared_by_rate_over_some_tasks(ask, command, files):
    cmap = recon.ConflictMap.load(files / "four.json")
    out = ask("map compare four.json four.json --by rate --tasks a,d")
    assert out["by"] == "rate"
    assert {of["name"]: of["scores"][0] for of in out["layers"]} == cmap.scores(tasks=("a", "d"), by="rate")


WRONG = {
    "a mistyped layer": ("map show fights.json --pairs xy", "Did you mean"),
    "an unknown layer": ("map show fights.json --pairs stem", "no layer in this map named 'stem'"),
    "an unknown task": ("map show fights.json --tasks a,e", "no task in this map named 'e'"),
    "one task": ("map show fights.json --tasks a", "two or more different tasks"),
    "an excess without a floor": ("map show fights.json --by excess", "`recon profile` makes one by default"),
    "a plan by excess": ("plan same.py:three --map fights.json --top-k 1 --by excess", "makes one by default"),
    "a picture without pairs": ("map show fights.json --picture p.png", "--picture goes with --pairs"),
    "pairs of an imported map": ("map show imported.json --pairs", "no counts by task pair"),
    "nothing to choose among": ("plan same.py:three --map fights.json --top-k 1 --exclude .", "leaves none of the 3"),
    "a mistyped exclusion": ("plan same.py:three --map fights.json --top-k 1 --exclude w", "no layer named 'w'"),
    "units of names": ("plan same.py:three --map fights.json --layers x --units y", "--units goes with a choice by"),
    "a score of names": ("plan same.py:three --map fights.json --layers x --by rate", "--by goes with a choice by"),
    "layers twice": ("plan same.py:three --map fights.json --top-k 1 --layers x --matching y", "not allowed with"),
    "exclude without a map": ("plan same.py:three --matching . --exclude w", "no layer named 'w'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_a_message(refused, case):
    refused(*WRONG[case])
