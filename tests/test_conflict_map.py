import json
from itertools import combinations

import numpy as np
import pytest

from recon.conflict_map import BINS, ConflictMap, LayerConflicts, threshold_bin
from recon.errors import MapFileError, UsageError


def make_map(layers=("conv", "norm", "fc"), tasks=("a", "b"), seed=0, steps=40, threshold=-0.1):
    rng = np.random.default_rng(seed)
    pairs = len(list(combinations(tasks, 2)))
    records = []
    for name in layers:
        cosines = rng.uniform(-1, 1, size=(4, steps // 4, pairs))
        bins = np.floor((cosines + 1) * 100).astype(int)
        histogram = np.bincount(bins.ravel(), minlength=BINS)
        conflicts = (bins < threshold_bin(threshold)).sum(axis=1)
        observed = np.full((4, pairs), steps // 4)
        records.append(LayerConflicts(name, "Conv2d", {"weight": [2, 3]}, histogram, conflicts, observed))
    return ConflictMap(tuple(tasks), threshold, steps, 0, (steps // 4,) * 4, records, {"problem": "toy"})


def test_scores_at_any_threshold_on_the_grid():
    cmap = make_map()
    histogram = cmap.layers[0].histogram
    for hundredths in range(-99, 1):
        assert cmap.scores(hundredths / 100)["conv"] == histogram[: 100 + hundredths].sum()
    assert cmap.scores() == cmap.scores(-0.1)


@pytest.mark.parametrize("threshold", [-1, 0.01, -0.123, 1, float("nan")])
def test_other_thresholds_are_refused(threshold):
    with pytest.raises(UsageError, match=r"multiple of 0\.01"):
        make_map().scores(threshold)


def test_ranking_is_by_score_then_model_order():
    cmap = make_map(layers=("x", "y", "z", "w"))
    for layer, score in zip(cmap.layers, (3, 7, 3, 7), strict=True):
        layer.histogram = np.zeros(BINS, dtype=np.int64)
        layer.histogram[0] = score
    assert cmap.ranking() == ["y", "w", "x", "z"]


def test_shares():
    cmap = make_map()
    for layer, share in zip(cmap.layers, cmap.shares().values(), strict=True):
        assert share == layer.conflicts.sum() / layer.observed.sum()
    cmap.layers[1].observed[2] = 0
    cmap.layers[1].conflicts[2] = 0
    assert np.isnan(cmap.stage_shares()[1, 2]) and not np.isnan(cmap.stage_shares()[0]).any()


def test_a_saved_map_loads_as_it_was(tmp_path):
    cmap = make_map(tasks=("a", "b", "c"))
    cmap.save(tmp_path / "new" / "map.json")
    loaded = ConflictMap.load(tmp_path / "new" / "map.json")
    assert (loaded.tasks, loaded.threshold, loaded.steps, loaded.skipped, loaded.stage_steps, loaded.made_by) == (
        (cmap.tasks, cmap.threshold, cmap.steps, cmap.skipped, cmap.stage_steps, cmap.made_by)
    )
    for one, other in zip(cmap.layers, loaded.layers, strict=True):
        assert (one.name, one.kind, one.shapes, one.size) == (other.name, other.kind, other.shapes, other.size)
        for counts in ("histogram", "conflicts", "observed"):
            assert np.array_equal(getattr(one, counts), getattr(other, counts))


def test_the_file_has_a_line_for_each_layer_and_stays_small(tmp_path):
    cmap = make_map(layers=[f"layer{i}" for i in range(62)], tasks=[f"task{i}" for i in range(40)], steps=8)
    cmap.save(tmp_path / "map.json")
    lines = (tmp_path / "map.json").read_text().splitlines()
    assert sum('"histogram"' in line for line in lines) == 62
    assert (tmp_path / "map.json").stat().st_size < 4e6
    assert list(tmp_path.iterdir()) == [tmp_path / "map.json"]


def damaged(tmp_path, change):
    path = tmp_path / "map.json"
    make_map().save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda d: d.update(format="something"), "'format'"),
        (lambda d: d.update(version=99), "'version'"),
        (lambda d: d.pop("tasks"), "'tasks'"),
        (lambda d: d.update(tasks=["a", "a"]), "'tasks'"),
        (lambda d: d.update(tasks=["a", 3]), "'tasks'"),
        (lambda d: d.update(threshold=0.5), "'threshold'"),
        (lambda d: d.update(threshold="low"), "'threshold'"),
        (lambda d: d.update(steps="many"), "'steps'"),
        (lambda d: d.update(steps=True), "'steps'"),
        (lambda d: d.update(stage_steps=[1, 2]), "'stage_steps'"),
        (lambda d: d.update(made_by=[]), "'made_by'"),
        (lambda d: d.update(layers={}), "'layers'"),
        (lambda d: d["layers"].append(3), r"'layers\[3\].shapes'"),
        (lambda d: d["layers"][1].pop("name"), r"'layers\[1\].name'"),
        (lambda d: d["layers"][1].update(name="conv"), "names a layer twice"),
        (lambda d: d["layers"][1].update(shapes={"weight": "big"}), r"'layers\[1\].shapes'"),
        (lambda d: d["layers"][2]["histogram"].pop(), r"'layers\[2\].histogram'"),
        (lambda d: d["layers"][2]["histogram"].__setitem__(0, -1), r"'layers\[2\].histogram'"),
        (lambda d: d["layers"][2]["histogram"].__setitem__(0, 10_000), r"'layers\[2\].histogram' does not add up"),
        (lambda d: d["layers"][0].update(conflicts=[[1], [2]]), r"'layers\[0\].conflicts'"),
        (lambda d: d["layers"][0].update(observed=[[1.5]] * 4), r"'layers\[0\].observed'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, field):
    path = damaged(tmp_path, change)
    with pytest.raises(MapFileError, match=field) as error:
        ConflictMap.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01", '{"format": "recon conflict map"'])
def test_a_file_that_is_no_whole_json_object(tmp_path, content):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(MapFileError, match=r"map\.json: "):
        ConflictMap.load(tmp_path / "map.json")


def test_a_binary_file(tmp_path):
    (tmp_path / "map.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(MapFileError, match="not whole JSON"):
        ConflictMap.load(tmp_path / "map.json")


def test_every_truncation_is_refused(tmp_path):
    make_map().save(tmp_path / "map.json")
    text = (tmp_path / "map.json").read_text().rstrip()
    for length in range(0, len(text), 101):
        (tmp_path / "map.json").write_text(text[:length])
        with pytest.raises(MapFileError, match="truncated"):
            ConflictMap.load(tmp_path / "map.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(MapFileError, match="there is no such file"):
        ConflictMap.load(tmp_path / "nowhere.json")


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot make the folder"):
        make_map().save(tmp_path / "file" / "map.json")


def test_a_failed_save_leaves_the_old_map(tmp_path, monkeypatch):
    make_map().save(tmp_path / "map.json")
    before = (tmp_path / "map.json").read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match="No space left"):
        make_map(seed=1).save(tmp_path / "map.json")
    assert (tmp_path / "map.json").read_text() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "map.json"]
