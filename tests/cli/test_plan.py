import json
from pathlib import Path

import pytest
import torch

import recon
from tests.cli.test_cli import PROBLEM, isolated
from tests.maps.test_conflict_map import score_map
from tests.plans.test_grouping import camps, pair_map

ARTIFACT = Path(__file__).parents[2] / "artifacts" / "multi-fashion-mnist-resnet18.json"

FOUR = (
    PROBLEM
    + """

TASKS = ("a", "b", "c", "d")


class Four(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.last = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def forward(self, x):
        x = self.last(self.norm(self.stem(x.flatten(1))).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def four(make_model=Four):
    def loaders(seed):
        raise AssertionError("the data were read, though the problem gives example inputs")

    return problem(name="four", tasks=[Task(task, mse_loss) for task in TASKS], make_model=make_model,
                   make_loaders=loaders, example_inputs=lambda: torch.randn(3, 1, 4, 4))


class PastPython(Four):
    # Hides a matrix product from whoever traces the forward.
    def forward(self, x):
        x = self.stem(x.flatten(1))
        with torch._C.DisableTorchFunction():
            x = x @ torch.eye(8)
        x = self.last(self.norm(x))
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def hidden():
    return four(PastPython)
"""
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two problems, maps for them, and a branched model."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "tiny.py").write_text(FOUR)
    score_map({"conv": 9, "norm": 5, "mix": 6}, tasks=("up", "down")).save(folder / "map.json")
    tasks = ("a", "b", "c", "d")
    counts = camps(tasks, lambda task: task in "ac", quiet=1, loud=30)
    pair_map({"stem": counts, "norm": counts, "last": counts}, tasks).save(folder / "four.json")
    recon.save(recon.convert(*_named_plan()), folder / "branched")
    return folder


def _named_plan():
    namespace = {}
    exec(PROBLEM, namespace)
    model = namespace["Net"]()
    return model, recon.BranchPlan.per_task(["norm", "mix"], ("up", "down")), torch.randn(4, 1, 4, 4)


TINY = "plan tiny.py:problem --map map.json"


def names(out):
    return [layer["name"] for layer in out["layers"]]


def test_a_plan_shows_its_layers_and_all_three_costs(command, ask):
    out = ask(f"{TINY} --top-k 2")
    assert [(layer["name"], layer["score"], layer["share"]) for layer in out["layers"]] == [
        ("conv", 9, 9 / 20),
        ("mix", 6, 6 / 20),
    ]
    assert out["covered"] == 15 / 20 and out["traced"]
    assert out["layers"][0]["groups"] == [["up"], ["down"]]
    costs = out["costs"]
    assert costs["before"]["parameters"] == 36 + 8 + 30 + 14
    assert costs["after"]["parameters"] - costs["before"]["parameters"] == 36 + 30
    assert costs["before"]["macs"] == 16 * 4 * 9 + 4 * 6 + 2 * 6  # per sample
    assert costs["after"]["macs"] - costs["before"]["macs"] == 16 * 4 * 9 + 4 * 6
    assert costs["ratio"]["macs"] == costs["after"]["macs"] / costs["before"]["macs"]
    assert costs["after"]["activation_bytes"] > costs["before"]["activation_bytes"] > 0
    assert {"conv", "norm", "mix"} <= set(out["runs_per_group"])
    code, text, _ = command(f"{TINY} --top-k 2")
    assert code == 0
    for words in (
        "2 of 3 shared layers: by score",
        "conv",
        "45.0%",
        "copies",
        "Conflict covered: 75.0 %",
        "parameters",
    ):
        assert words in text
    for words in ("multiply-adds", "activation memory", "before", "after", "ratio", "one traced forward"):
        assert words in text


def test_it_changes_nothing_and_names_the_next_command(command, files):
    before = sorted(files.rglob("*"))
    code, text, _ = command(f"{TINY} --max-macs 1.5 --select random --seed 3")
    assert code == 0 and sorted(files.rglob("*")) == before
    line = next(line for line in text.splitlines() if "recon convert" in line)
    assert line.split() == (
        "recon convert tiny.py:problem --map map.json --max-macs 1.5 --select random --seed 3 --out branched".split()
    )


@pytest.mark.parametrize(
    "choice",
    [
        "--share 0.7",
        "--max-macs 1.5",
        "--max-params 1.5 --max-macs 1.2",
        "--top-k 2 --select last",
        "--select norms",
        "--layers mix conv",
        "--matching .*o.*",
        "--like branched --select random --seed 1",
    ],
)
def test_convert_branches_what_plan_shows(command, ask, tmp_path, choice):
    shown = ask(f"{TINY} {choice}")
    done = ask(f"{TINY} {choice} --out".replace("plan", "convert", 1), tmp_path / "new")
    assert done["branched_layers"] == names(shown)
    assert (done["surgery"], done["covered"]) == (shown["surgery"], shown["covered"])
    for what in ("parameters", "macs"):
        assert done["costs"]["ratio"][what] == pytest.approx(shown["costs"]["ratio"][what])


def test_each_way_has_its_name(ask):
    surgery = {
        "--share 0.7": "share=0.7",
        "--max-params 1.5 --max-macs 1.2": "max_params=1.5 max_macs=1.2",
        "--max-macs 1.9 --select last": "last max_macs=1.9",
        "--top-k 2 --select first": "first K=2",
        "--select norms": "all norms",
        "--matching .*o.*": "K=2 by name",
        "--like branched --select last": "last like branched",
        "--top-k 1 --groups up down": "Recon K=1, groups up down",
    }
    assert {choice: ask(f"{TINY} {choice}")["surgery"] for choice in surgery} == surgery


def test_groups_on_the_command_line(ask, command):
    line = "plan tiny.py:four --map four.json --top-k 1 --groups"
    halves = [["a", "c"], ["b", "d"]]
    for groups in ("2", "conflict", "a+c b+d"):
        assert ask(f"{line} {groups}")["layers"][0]["groups"] == halves
    assert ask(f"{line} per-task")["layers"][0]["groups"] == [["a"], ["b"], ["c"], ["d"]]
    two, four = (ask(f"{line} {groups}") for groups in ("2", "per-task"))
    assert two["covered"] < four["covered"]
    assert two["costs"]["ratio"]["macs"] < four["costs"]["ratio"]["macs"]
    code, text, _ = command(f"{line} 2")
    assert code == 0 and "2 copies: a c | b d" in text and "--groups 2 --out branched" in text


def test_layers_can_be_named_without_a_map(ask, command):
    out = ask("plan tiny.py:four --layers last stem --groups a+b c+d")
    assert names(out) == ["stem", "last"] and out["covered"] is None and out["map"] is None
    assert out["layers"][0]["groups"] == [["a", "b"], ["c", "d"]]
    assert names(ask("plan tiny.py:four --matching s.*|norm")) == ["stem", "norm"]


def test_a_forward_that_cannot_be_traced_is_measured(command, ask):
    line = "plan tiny.py:hidden --map four.json --groups 2"
    out = ask(f"{line} --layers last")
    assert not out["traced"] and out["unsupported"]
    assert out["costs"]["after"]["macs"] - out["costs"]["before"]["macs"] == 8 * 4
    code, text, _ = command(f"{line} --layers last")
    assert code == 0 and "Measured by a dry run of the converted model" in text
    greedy = ask(f"{line} --max-macs 2.5")  # stem, which the hidden product keeps from being branched, is passed over
    assert names(greedy) == ["norm", "last"] and "found greedily" in greedy["reason"]


WRONG = {
    "a budget below 1": (f"{TINY} --max-macs 0.9", "max_macs is 0.9"),
    "no layer fits": (f"{TINY} --max-params 1.05", "The cheapest, 'norm', would need 1.091x the parameters"),
    "an unknown layer": (f"{TINY} --layers nrm", "'norm'"),
    "a pattern that matches nothing": (f"{TINY} --matching nor", "'norm'"),
    "a broken pattern": (f"{TINY} --matching nor(", "not a regular expression"),
    "groups that miss a task": ("plan tiny.py:four --map four.json --top-k 1 --groups a+b c", "leave out ['d']"),
    "too many groups": ("plan tiny.py:four --map four.json --top-k 1 --groups 5", "2 to 4 groups"),
    "groups of a map without pairs": (f"{TINY} --top-k 1 --groups conflict", "does not hold the conflicts"),
    "two ways": (f"{TINY} --top-k 1 --share 0.5", "not allowed with"),
    "a budget and K": (f"{TINY} --top-k 1 --max-macs 2", "argument --max-macs: not allowed with argument --top-k"),
    "no way": (TINY, "--top-k --share --max-params --max-macs --auto"),
    "K without a map": ("plan tiny.py:problem --top-k 1", "--top-k needs --map MAP"),
    "groups without a map": ("plan tiny.py:problem --layers mix --groups 2", "--groups 2 needs --map MAP"),
    "a control of names": (f"{TINY} --layers mix --select last", "--select goes with"),
    "a control of a share": (f"{TINY} --share 0.5 --select last", "select='last' works with"),
    "like without a control": (f"{TINY} --like branched", "makes a control"),
    "like no model": (f"{TINY} --like nope --select last", "no model was saved there"),
    "auto without series": (f"{TINY} --auto", "holds no scores over time"),
    "an unknown control": (f"{TINY} --top-k 1 --select best", "invalid choice"),
    "a share of nothing": (f"{TINY} --share 0", "above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_a_message(refused, case):
    refused(*WRONG[case])


def test_the_shipped_map_of_a_resnet_18_is_answered_without_the_data(tmp_path):
    """As a command, imports and all; the data are not needed, the files only looked for."""
    for source in ("MNIST", "FashionMNIST"):
        (tmp_path / source / "raw").mkdir(parents=True)
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (tmp_path / source / "raw" / f"{name}-ubyte").touch()
    line = ["plan", "multi-fashion-mnist", "--data-root", str(tmp_path), "--map", str(ARTIFACT), "--max-macs", "1.25"]
    out = json.loads(isolated(f"import sys; from recon_cli.main import main; sys.exit(main({[*line, '--json']}))"))
    assert 1 < out["costs"]["ratio"]["macs"] <= 1.25
    assert 0 < out["covered"] < 0.2
    assert "layer4.1.bn1" in names(out)
