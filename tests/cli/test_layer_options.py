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
    return problem(name="blocks", make_model=Blocks, loss=interrupted().losses["up"])
"""
)
PROFILE = "profile tiny.py:blocks --epochs 2"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "tiny.py").write_text(BODY)
    return tmp_path


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
    line = "profile tiny.py:dies --epochs 2 --out map.json"
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
