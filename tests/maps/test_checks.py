"""A map file whose numbers contradict each other is refused, whatever each of them says by itself."""

import json

import numpy as np
import pytest

from recon.errors import MapFileError
from recon.maps.conflict_map import ConflictMap
from recon.maps.files.checks import MOST_LAYERS
from tests.maps.test_conflict_map import damaged, make_map, score_map, with_series


def set_all(key, value):
    return lambda d: [layer.update({key: value}) for layer in d["layers"]]


def move_a_conflict(d):
    """A conflict of the first quarter that was observed in the second."""
    conflicts, observed = d["layers"][1]["conflicts"], d["layers"][1]["observed"]
    conflicts[1][0] += conflicts[0][0]
    conflicts[0][0] = 0
    observed[0][0] += observed[1][0]
    observed[1][0] = 0


CONTRADICTIONS = {
    "skipped above steps": (lambda d: d.update(skipped_non_finite=41), "'skipped_non_finite' is 41, above the 40"),
    "stages of other steps": (lambda d: d.update(stage_steps=[10, 10, 10, 11]), "'stage_steps' adds up to 41"),
    "more steps than counted": (
        lambda d: d.update(steps=10**30),
        "'steps' is 10+, not a whole number of at least 0",
    ),
    "fewer steps than stages": (lambda d: d.update(steps=39), "'stage_steps' adds up to 40, not to the 39"),
    "skipped steps that were observed": (
        lambda d: d.update(skipped_non_finite=1),
        "'layers.0..observed' counts a pair",
    ),
    "a longer quarter": (
        lambda d: d.update(stage_steps=[9, 11, 10, 10]),
        "'layers.0..observed' counts a pair more often than its quarter",
    ),
    "conflicts that nobody observed": (move_a_conflict, "'layers.1..conflicts' counts more conflicts"),
    "a negative shape": (set_all("shapes", {"weight": [-2, -3]}), "'layers.0..shapes.weight'"),
    "a huge shape": (set_all("shapes", {"weight": [10**9, 10**9]}), "'layers.0..shapes'"),
    "a shape of many sides": (set_all("shapes", {"weight": [1] * 10_000}), "'layers.0..shapes'"),
    "a shape of truth values": (set_all("shapes", {"weight": [True]}), "'layers.0..shapes.weight'"),
    "other numbers of parameters": (set_all("parameters", 7), "'layers.0..parameters' is 7, but the shapes say 6"),
    "a threshold off the grid": (lambda d: d.update(threshold=-0.105), "'threshold'"),
    "a threshold that is no number": (lambda d: d.update(threshold=float("nan")), "holds NaN"),
    "a threshold that no float holds": (lambda d: d.update(threshold=-(10**400)), "'threshold'"),
    "a count beyond 64 bits": (lambda d: d["layers"][0]["histogram"].__setitem__(0, 2**64), "'layers.0..histogram'"),
    "counts that overflow together": (
        lambda d: d["layers"][0]["histogram"].__setitem__(slice(2), [2**63 - 1] * 2),
        "'layers.0..histogram'",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_counts_that_contradict_each_other(tmp_path, name):
    change, words = CONTRADICTIONS[name]
    path = damaged(tmp_path, change)
    with pytest.raises(MapFileError, match=words) as error:
        ConflictMap.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(lambda d: d.update(bin_steps=7), "5 bins of 7 steps, which does not fit 40 steps", id="bins"),
        pytest.param(
            lambda d: [layer.update(series=[sum(layer["series"]), 0, 0, 0, 0]) for layer in d["layers"]],
            "'layers.0..series' counts more conflicts in a bin than it has",
            id="all in one bin",
        ),
    ],
)
def test_a_series_that_contradicts_the_steps(tmp_path, change, words):
    with pytest.raises(MapFileError, match=words):
        ConflictMap.load(damaged(tmp_path, change, with_series(make_map())))


def test_scores_that_no_training_can_give(tmp_path):
    cmap = score_map({"fc": 3, "conv": 9}, tasks=("a", "b"))
    cmap.steps = 8
    cmap.save(tmp_path / "map.json")
    with pytest.raises(MapFileError, match=r"'layers.1..score' counts more than 8 steps of 1 pairs have"):
        ConflictMap.load(tmp_path / "map.json")


def test_more_layers_than_any_network_has(tmp_path):
    path = damaged(tmp_path, lambda d: d.update(layers=[{}] * (MOST_LAYERS + 1)))
    with pytest.raises(MapFileError, match=f"'layers' has {MOST_LAYERS + 1} entries"):
        ConflictMap.load(path)


def test_one_wrong_count_is_seen_wherever_it_is(tmp_path):
    """Every count of a small map, changed by one: none passes."""
    path = tmp_path / "map.json"
    with_series(make_map(layers=("conv",))).save(path)
    text = path.read_text()
    rng = np.random.default_rng(0)
    for key in ("histogram", "conflicts", "observed", "series"):
        size = np.array(json.loads(text)["layers"][0][key]).size
        for place in rng.choice(size, size=min(size, 12), replace=False):
            document = json.loads(text)
            values = np.array(document["layers"][0][key])
            values.flat[place] += 1
            document["layers"][0][key] = values.tolist()
            path.write_text(json.dumps(document))
            with pytest.raises(MapFileError, match=r"layers\[0\]"):
                ConflictMap.load(path)


UNREADABLE = {
    "nested deeply": (lambda text: text.replace('"toy"', "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "a key twice": (lambda text: text.replace('"steps": 40,', '"steps": 40, "steps": 40,'), "'steps' twice"),
    "a layer's key twice": (lambda text: text.replace('"score": null,', '"score": null, "score": null,'), "twice"),
    "not finite": (lambda text: text.replace("-0.1", "NaN"), "holds NaN"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_document_that_no_recon_wrote(tmp_path, name):
    change, words = UNREADABLE[name]
    make_map().save(tmp_path / "map.json")
    text = (tmp_path / "map.json").read_text()
    assert change(text) != text
    (tmp_path / "map.json").write_text(change(text))
    with pytest.raises(MapFileError, match=words):
        ConflictMap.load(tmp_path / "map.json")


def test_a_file_too_large_is_not_read(tmp_path):
    with open(tmp_path / "map.json", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(MapFileError, match="larger than 64 MiB"):
        ConflictMap.load(tmp_path / "map.json")
