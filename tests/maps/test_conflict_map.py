import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from recon.errors import MapFileError, UsageError, WriteError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import BINS, LayerConflicts, threshold_bin


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


def score_map(scores, threshold=-0.1, tasks=()):
    """A map that knows names and scores alone, as an imported one."""
    layers = [LayerConflicts(name, "", {}, None, None, None, score=score) for name, score in scores.items()]
    return ConflictMap(tuple(tasks), threshold, None, None, (), layers, {"source": "toy"})


def with_series(cmap, bins=5):
    """The same map with a series: its conflicts dealt out to the bins."""
    for layer in cmap.layers:
        total = int(layer.conflicts.sum())
        layer.series = np.array([total // bins] * (bins - 1) + [total - total // bins * (bins - 1)])
    return replace(cmap, bin_steps=-(-cmap.steps // bins))


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


def test_a_map_of_scores_answers_at_its_own_threshold_alone():
    cmap = score_map({"fc": 3, "conv": 9, "norm": 3}, threshold=-0.02)
    assert cmap.scores() == cmap.scores(-0.02) == {"fc": 3, "conv": 9, "norm": 3}
    assert cmap.ranking() == ["conv", "fc", "norm"]
    assert np.isnan(list(cmap.shares().values())).all()
    assert cmap.stage_shares().shape == (3, 4) and np.isnan(cmap.stage_shares()).all()
    assert cmap.layers[0].size is None and cmap.pairs == []
    for ask in (cmap.scores, cmap.shares, cmap.ranking):
        with pytest.raises(UsageError, match=r"only its scores at S=-0\.02"):
            ask(-0.03)


def test_shares():
    cmap = make_map()
    for layer, share in zip(cmap.layers, cmap.shares().values(), strict=True):
        assert share == layer.conflicts.sum() / layer.observed.sum()
    cmap.layers[1].observed[2] = 0
    cmap.layers[1].conflicts[2] = 0
    assert np.isnan(cmap.stage_shares()[1, 2]) and not np.isnan(cmap.stage_shares()[0]).any()


MAPS = {
    "plain": make_map(tasks=("a", "b", "c")),
    "with a series": with_series(make_map(tasks=("a", "b", "c"))),
    "scores alone": score_map({"fc": 3, "conv": 9}),
    "scores and tasks": score_map({"fc": 3, "conv": 9}, tasks=("a", "b")),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_saved_map_loads_as_it_was(tmp_path, kind):
    cmap = MAPS[kind]
    cmap.save(tmp_path / "new" / "map.json")
    loaded = ConflictMap.load(tmp_path / "new" / "map.json")
    for key in ("tasks", "threshold", "steps", "skipped", "stage_steps", "made_by", "bin_steps"):
        assert getattr(loaded, key) == getattr(cmap, key)
    for one, other in zip(cmap.layers, loaded.layers, strict=True):
        assert (one.name, one.kind, one.shapes, one.size) == (other.name, other.kind, other.shapes, other.size)
        assert one.score == other.score
        for key in ("histogram", "conflicts", "observed", "series"):
            mine, theirs = getattr(one, key), getattr(other, key)
            assert theirs is None if mine is None else np.array_equal(mine, theirs)


def test_the_file_has_a_line_for_each_layer_and_stays_small(tmp_path):
    cmap = make_map(layers=[f"layer{i}" for i in range(62)], tasks=[f"task{i}" for i in range(40)], steps=8)
    cmap.save(tmp_path / "map.json")
    lines = (tmp_path / "map.json").read_text().splitlines()
    assert sum('"histogram"' in line for line in lines) == 62
    assert (tmp_path / "map.json").stat().st_size < 4e6
    assert list(tmp_path.iterdir()) == [tmp_path / "map.json"]


def damaged(tmp_path, change, cmap=None):
    path = tmp_path / "map.json"
    (cmap or make_map()).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda d: d.update(format="something"), "'format'"),
        (lambda d: d.update(version=99), "'version'"),
        (lambda d: d.update(version=1), "'version' is 1, but this recon reads version 2 and 3"),
        (lambda d: d.pop("tasks"), "'tasks'"),
        (lambda d: d.update(tasks=["a", "a"]), "'tasks'"),
        (lambda d: d.update(tasks=["a", 3]), "'tasks'"),
        (lambda d: d.update(tasks=["a"]), "'tasks'"),
        (lambda d: d.update(tasks=[]), r"'layers\[0\].conflicts'"),
        (lambda d: d.update(threshold=0.5), "'threshold'"),
        (lambda d: d.update(threshold="low"), "'threshold'"),
        (lambda d: d.update(steps="many"), "'steps'"),
        (lambda d: d.update(steps=True), "'steps'"),
        (lambda d: d.update(stage_steps=[1, 2]), "'stage_steps'"),
        (lambda d: d.update(made_by=[]), "'made_by'"),
        (lambda d: d.update(layers={}), "'layers'"),
        (lambda d: d.update(layers=[]), "'layers' is empty"),
        (lambda d: d.pop("bin_steps"), "'bin_steps'"),
        (lambda d: d.update(bin_steps=None), "'bin_steps'"),
        (lambda d: d.update(bin_steps=2), "'bin_steps' is 2: above 0 with series"),
        (lambda d: d["layers"][1].pop("series"), r"'layers\[1\].series'"),
        (lambda d: d["layers"][1].update(score=3), r"'layers\[1\].score' is 3, but its histogram says"),
        (lambda d: d["layers"][1].update(score=-3), r"'layers\[1\].score' is -3"),
        (lambda d: d["layers"][1].update(histogram=None), r"'layers\[1\].histogram' is known here and not"),
        (lambda d: d["layers"][1].update(conflicts=None), r"'layers\[1\].conflicts' is known here and not"),
        (lambda d: [layer.update(observed=None) for layer in d["layers"]], r"'layers\[0\].conflicts' goes with"),
        (lambda d: [layer.update(histogram=None) for layer in d["layers"]], r"'layers\[0\].score' is missing"),
        (
            lambda d: [layer.update(histogram=None, score=3) for layer in d["layers"]],
            r"'layers\[0\].histogram' is missing, though",
        ),
        (lambda d: d["layers"].append(3), r"'layers\[3\]'"),
        (lambda d: d["layers"][1].pop("name"), r"'layers\[1\].name'"),
        (lambda d: d["layers"][1].update(name="conv"), "names a layer twice"),
        (lambda d: d["layers"][1].update(shapes={"weight": "big"}), r"'layers\[1\].shapes.weight'"),
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


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda d: d["layers"][1]["series"].pop(), "'series' has not the same length in all layers"),
        (lambda d: d["layers"][1].update(series=None), "'series' has not the same length in all layers"),
        (lambda d: d["layers"][1]["series"].__setitem__(0, 999), r"'layers\[1\].series' does not add up to the score"),
        (lambda d: d["layers"][1]["series"].__setitem__(0, -1), r"'layers\[1\].series'"),
        (lambda d: d["layers"][1]["series"].__setitem__(0, "x"), r"'layers\[1\].series'"),
        (lambda d: d["layers"][1].update(series=3), r"'layers\[1\].series' has the wrong type"),
        (lambda d: d.update(bin_steps=0), "'bin_steps' is 0"),
        (lambda d: d.update(bin_steps=-1), "'bin_steps' is -1"),
        (lambda d: [layer.update(series=None) for layer in d["layers"]], "'bin_steps' is 8"),
        (lambda d: [layer["series"].extend([0] * 508) for layer in d["layers"]], "'series' has 513 bins, not 1 to 512"),
    ],
)
def test_a_wrong_series_is_named(tmp_path, change, field):
    with pytest.raises(MapFileError, match=field):
        ConflictMap.load(damaged(tmp_path, change, with_series(make_map())))


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda d: d["layers"][0].update(score=None), r"'layers\[0\].score' is missing"),
        (lambda d: d["layers"][0].pop("score"), r"'layers\[0\].score'"),
        (lambda d: d["layers"][0].update(score=1.5), r"'layers\[0\].score'"),
        (lambda d: d["layers"][1].update(name="fc"), "names a layer twice"),
        (lambda d: d.update(steps="many"), "'steps'"),
        (lambda d: d.update(stage_steps=None), "'stage_steps'"),
    ],
)
def test_a_wrong_field_in_a_map_of_scores_is_named(tmp_path, change, field):
    with pytest.raises(MapFileError, match=field):
        ConflictMap.load(damaged(tmp_path, change, score_map({"fc": 3, "conv": 9})))


def test_a_published_score_file_is_told_apart(tmp_path):
    (tmp_path / "scores.json").write_text('{"conv": 9, "fc": 3}')
    with pytest.raises(MapFileError, match=r"not a conflict map; `recon map import` reads"):
        ConflictMap.load(tmp_path / "scores.json")


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
    with pytest.raises(WriteError, match="No space left"):
        make_map(seed=1).save(tmp_path / "map.json")
    assert (tmp_path / "map.json").read_text() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "map.json"]


def test_a_map_prints_as_one_line():
    assert repr(make_map()).startswith("ConflictMap(2 tasks, 3 shared layers, 40 steps, S=-0.1; first: ")


def test_how_sure_the_scores_are():
    cmap = with_series(make_map(), bins=20)
    for name, (low, high) in cmap.intervals().items():
        assert low <= cmap.scores()[name] <= high
    assert cmap.intervals(0.5)["conv"][0] >= cmap.intervals(0.99)["conv"][0]
    probabilities = cmap.top_k_probability(2)
    assert list(probabilities) == [layer.name for layer in cmap.layers]
    assert sum(probabilities.values()) == pytest.approx(2)


@pytest.mark.parametrize("cmap", [score_map({"a": 3, "b": 1}), make_map()], ids=["imported", "no series"])
def test_a_map_without_series_cannot_tell_how_sure_it_is(cmap):
    assert not cmap.has_series
    for ask in (cmap.series, cmap.intervals, lambda: cmap.top_k_probability(1)):
        with pytest.raises(UsageError, match="holds no scores over time"):
            ask()
