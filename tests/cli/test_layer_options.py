"""Which layers a profile counts in, from the command line to the branched model."""

import pytest

import recon
from tests.cli.test_cli import PROBLEM

BODY = (
    PROBLEM
    + r"""

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(2))
        self.heads = nn.ModuleDict({"up": nn.Linear(6, 1), "down": nn.Linear(6, 1)})

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def blocks():
    return problem(name="blocks", make_model=Blocks)


def dies():
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 9:  # of twelve steps, besides those that look first
            raise KeyboardInterrupt
        return mse_loss(output, target)

    return problem(name="blocks", make_model=Blocks, loss=loss)
"""
)
PROFILE = "profile tiny.py:blocks --epochs 2"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "tiny.py").write_text(BODY)
    return tmp_path


def test_a_map_of_blocks_is_profiled_shown_compared_merged_planned_and_converted(ask):
    units = ["--exclude", "heads.*", "--units", r"blocks\.\d"]
    answer = ask(f"{PROFILE} --out map.json", *units)
    assert {layer["name"]: layer.get("members") for layer in answer["layers"]} == {
        "stem": None,
        "blocks.0": ["blocks.0.0", "blocks.0.1"],
        "blocks.1": ["blocks.1.0", "blocks.1.1"],
    }
    cmap = recon.ConflictMap.load("map.json")
    assert cmap.made_by["units"] == [r"blocks\.\d"] and cmap.made_by["exclude"] == ["heads.*"]
    ask(f"{PROFILE} --seed 1 --out other.json", *units)
    shown = ask("map show map.json")
    assert [layer.get("members") for layer in shown["layers"]] == [layer.get("members") for layer in answer["layers"]]
    compared = ask("map compare map.json other.json")
    assert len(compared["layers"]) == 3 and compared["regrouped"] == []
    ask("map merge map.json other.json --out both.json")
    assert recon.ConflictMap.load("both.json").layers[1].members == cmap.layers[1].members
    plan = ask("plan tiny.py:blocks --map map.json --top-k 3")
    names = ["stem", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]
    assert [layer["name"] for layer in plan["layers"]] == names and plan["covered"] == 1
    last = ask("convert tiny.py:blocks --map map.json --top-k 1 --select last --out branched")
    assert last["branched_layers"] == names[3:]
    frontier = ask("plan tiny.py:blocks --map map.json --max-macs 2 --frontier")["frontier"]
    assert [len(point["layers"]) for point in frontier if point["selector"] == "top_k=3"] == [5]


def test_a_finished_map_of_other_layers_is_not_taken_for_the_answer(command):
    for options, message in (
        (["--layers", "stem", r"blocks\..*"], ""),
        (["--layers", "stem", r"blocks\..*", "--resume"], "nothing to resume"),
        (["--layers", "stem", "--resume"], "will be replaced"),
    ):
        code, _, err = command(PROFILE, *options, "--out", "map.json")
        assert code == 0 and message in err
    assert [layer.name for layer in recon.ConflictMap.load("map.json").layers] == ["stem"]


def test_an_interrupted_profile_goes_on_with_the_same_layers_only(command):
    line = "profile tiny.py:dies --epochs 4 --out map.json"
    code, _, err = command(line, "--units", r"blocks\.\d")
    assert code != 0 and r"--units 'blocks\.\d'" in err and err.rstrip().endswith("--resume")
    code, _, err = command(line, "--resume")
    assert code == 2 and "units" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "stam"], "Did you mean 'stem'"),
        (["--layers", "blocks"], r"Write 'blocks\..*'"),
        (["--exclude", ".*"], "leaves none"),
        (["--units", "stem"], "joins nothing"),
        (["--units", "(blocks"], "not a regular expression"),
    ],
    ids=["unknown", "container", "all", "nothing", "no-expression"],
)
def test_bad_choices_end_with_exit_code_2(options, message, command, files):
    code, _, err = command(PROFILE, *options, "--out", "map.json")
    assert code == 2 and message in err
    assert [path.name for path in files.iterdir() if path.name.startswith("map")] == []
