"""Every method trains digits on the command line, plain and branched."""

import json
import math

import pytest

import recon

FEW = "--train-samples 256 --epochs 2"  # two steps an epoch: methods that compare epochs have something to compare
PLAIN = ["joint", "gradnorm", "pcgrad", "rotograd"]  # one of each kind: a method cannot tell a branched model
COMPOSED = ["uw+pcgrad", "dwa:temperature=1+graddrop:leak=0.1", "famo+excessmtl", "mgda:normalize=loss+"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture
def branched(ask, files):
    if not (files / "branched").exists():
        ask("convert digits --layers blocks.1.bn1 blocks.2.conv1 --no-verify --out branched")
    return "branched"


@pytest.mark.parametrize(
    ("method", "plain"),
    [*((method, False) for method in [*recon.methods.names(), *COMPOSED]), *((method, True) for method in PLAIN)],
    ids=lambda value: {True: "plain", False: "branched"}.get(value, value),
)
def test_every_method_trains_digits(ask, files, branched, method, plain):
    out = f"{method.replace(':', '_')}-{plain}"
    report = ask(f"train digits {FEW} --method {method} {'' if plain else f'--model {branched}'} --out", out)
    assert report["finished"] and report["method"] == method
    losses = [loss for epoch in report["history"] for loss in epoch["losses"].values()]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    lines = [json.loads(line) for line in (files / out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    weighted = method not in ("graddrop", COMPOSED[1])  # it has no weights
    for line in steps:
        assert set(line["weights"]) == ({"top_left", "bottom_right"} if weighted else set())
        assert all(map(math.isfinite, line["weights"].values()))
