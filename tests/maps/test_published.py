import json
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import recon
from recon.errors import MapFileError, UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.published import read_published

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published-maps"
SCORES = {"bn1": 90, "layer1.0.bn1": 70, "layer1.0.conv1": 70, "conv1": 5}
TASKS = ("a", "b", "c")


@pytest.fixture
def scores(tmp_path):
    """Writes a score file; gives its path."""

    def write(content, name="scores.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return write


@pytest.fixture
def log(tmp_path):
    """Writes a log of cosines; gives its path."""

    def write(content, name="0_Baseline_ep39_lw_cos.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


def random_cosines(steps=50, pairs=3, layers=("conv1", "bn1", "fc"), seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(-1, 1, size=(steps, pairs)).astype(np.float32) for name in layers}


def as_log(cosines):
    return {"cos": OrderedDict((name, [torch.tensor(row) for row in rows]) for name, rows in cosines.items())}


def test_a_score_file(scores):
    cmap = read_published(scores(SCORES), -0.02)
    assert cmap.scores() == SCORES and list(cmap.scores()) == list(SCORES)
    assert cmap.ranking() == list(SCORES)
    assert (cmap.tasks, cmap.threshold, cmap.steps, cmap.skipped, cmap.stage_steps) == ((), -0.02, None, None, ())
    assert cmap.made_by["imported"] == "scores.json"
    assert np.isnan(list(cmap.shares().values())).all() and np.isnan(cmap.stage_shares()).all()
    assert all(layer.size is None for layer in cmap.layers)
    with pytest.raises(UsageError, match=r"only its scores at S=-0\.02"):
        cmap.scores(-0.1)


def test_a_score_file_s_order_stays_and_its_tasks_are_known_if_given(scores):
    cmap = read_published(scores({"z": 1, "a": 1, "b": 2}), -0.1, TASKS)
    assert (list(cmap.scores()), cmap.ranking(), cmap.tasks) == (["z", "a", "b"], ["b", "z", "a"], TASKS)


@pytest.mark.parametrize("tasks", [(), TASKS])
@pytest.mark.parametrize("kind", ["scores", "log"])
def test_an_imported_map_is_saved_and_loaded_as_it_was(scores, log, tmp_path, tasks, kind):
    path = scores(SCORES) if kind == "scores" else log(as_log(random_cosines()))
    cmap = read_published(path, -0.1, tasks)
    cmap.save(tmp_path / "map.json")
    loaded = ConflictMap.load(tmp_path / "map.json")
    assert loaded.scores() == cmap.scores() and list(loaded.scores()) == list(cmap.scores())
    for key in ("tasks", "threshold", "steps", "skipped", "stage_steps", "bin_steps", "made_by"):
        assert getattr(loaded, key) == getattr(cmap, key)
    for one, other in zip(cmap.layers, loaded.layers, strict=True):
        for key in ("histogram", "conflicts", "observed", "series"):
            mine, theirs = getattr(one, key), getattr(other, key)
            assert theirs is None if mine is None else np.array_equal(mine, theirs)


NAMES = [
    ("layer1.0.conv1.m_list.0", "layer1.0.conv1"),
    ("conv1.m_list.12", "conv1"),
    ("decoder.m_list.1.bn1", "decoder.bn1"),
    ("feature_extractor.layer1.0.conv1.m_list.0", "layer1.0.conv1"),
    ("feature_extractor.bn1", "bn1"),
    ("net.feature_extractor.bn1", "net.feature_extractor.bn1"),
    ("m_listen.conv", "m_listen.conv"),
]


@pytest.mark.parametrize("name, plain", NAMES)
def test_names_are_those_of_a_plain_network(scores, log, name, plain):
    assert list(read_published(scores({name: 3, "other": 1}), -0.1).scores()) == [plain, "other"]
    path = log(as_log(random_cosines(layers=(name, "other"))))
    assert list(read_published(path, -0.1).scores()) == [plain, "other"]


def test_copies_of_one_layer_are_refused(scores):
    path = scores({"conv1.m_list.0": 3, "bn1": 2, "conv1.m_list.1": 1})
    with pytest.raises(MapFileError, match=r"several copies of the layer 'conv1' .*the network was branched"):
        read_published(path, -0.1)


@pytest.mark.parametrize(
    "name, threshold, layers, first",
    [
        ("multi-fashion-mnist-resnet18-S-0.1.json", -0.1, 41, ("bn1", 4427)),
        ("cityscapes-segnet-S0.0.json", 0.0, 52, ("decoder_block.0.bn1", 7566)),
        ("nyuv2-mtan-S-0.02.json", -0.02, 72, ("decoder_block_att.1.bn1", 25646)),
    ],
)
def test_the_published_score_files(name, threshold, layers, first):
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip("needs the published score files in ../shared/data")
    cmap = read_published(path, threshold)
    assert cmap.scores() == json.loads(path.read_text())
    assert len(cmap.layers) == layers and next(iter(cmap.scores().items())) == first
    assert cmap.ranking() == list(cmap.scores())
    with pytest.raises(UsageError, match=f"S={name[:-5].rpartition('-S')[2]}, not -0.5"):
        read_published(path, -0.5)


def test_the_published_scores_of_a_resnet_choose_the_layers_of_torchvision_s():
    path = PUBLISHED / "multi-fashion-mnist-resnet18-S-0.1.json"
    if not path.exists():
        pytest.skip("needs the published score files in ../shared/data")
    from torchvision.models import resnet18

    model = resnet18()
    plan = recon.plan(read_published(path, -0.1), model, top_k=25, tasks=("left", "right"))
    assert set(plan.layers) == set(list(json.loads(path.read_text()))[:25])


@pytest.mark.parametrize("threshold", [-0.5, -0.1, 0.0])
def test_a_log_gives_the_map_that_its_cosines_make(log, threshold):
    cosines = random_cosines(steps=50)
    cosines["bn1"][7] = np.nan
    cosines["fc"][7:9, 1] = np.nan
    for rows in cosines.values():
        rows[3] = np.nan  # a step without any
    cmap = read_published(log(as_log(cosines)), threshold, TASKS)
    assert (cmap.tasks, cmap.threshold, cmap.steps, cmap.skipped) == (TASKS, threshold, 50, 1)
    assert cmap.pairs == list(combinations(TASKS, 2))
    quarters = [range(12), range(12, 25), range(25, 37), range(37, 50)]  # a step belongs where its middle lies
    assert cmap.stage_steps == tuple(map(len, quarters))
    for layer in cmap.layers:
        rows = cosines[layer.name]
        for q, quarter in enumerate(quarters):
            for pair in range(3):
                values = [rows[step, pair] for step in quarter if not np.isnan(rows[step, pair])]
                assert layer.observed[q, pair] == len(values)
                assert layer.conflicts[q, pair] == sum(value < np.float32(threshold) for value in values)
        assert layer.series.tolist() == [int((row < np.float32(threshold)).sum()) for row in rows]
        assert np.array_equal(layer.below, [(rows < np.float32(s)).sum(axis=0) for s in cmap.thresholds])
        assert np.array_equal(layer.pair_series, rows < np.float32(threshold))
    met = np.isfinite(list(cosines.values())).any(axis=0)
    assert threshold in cmap.thresholds and cmap.pair_bin_steps == 1 and np.array_equal(cmap.met, met)
    for s in (-0.99, -0.75, -0.1, -0.01, 0.0):
        assert cmap.scores(s) == {name: int((rows < np.float32(s)).sum()) for name, rows in cosines.items()}


def test_cosines_on_the_grid_are_no_conflicts_and_one_is_counted(log):
    rows = np.array([[-0.1], [np.nextafter(np.float32(-0.1), np.float32(-1))], [0.0], [1.0], [-1.0], [1.0000002]])
    cmap = read_published(log(as_log({"conv": rows.astype(np.float32)})), -0.1)
    assert cmap.scores() == {"conv": 2} and cmap.scores(0.0) == {"conv": 3}
    histogram = cmap.layers[0].histogram
    assert histogram.sum() == 6 and (histogram[0], histogram[-1]) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logs_of_other_precisions(log, dtype):
    values = torch.tensor([[-0.5], [0.5], [-0.75]], dtype=dtype)
    assert read_published(log({"cos": {"conv": list(values)}}), -0.1).scores() == {"conv": 2}


@pytest.mark.parametrize("steps, bin_steps", [(1, 1), (511, 1), (512, 1), (513, 2), (1024, 2), (1025, 4), (3000, 8)])
def test_a_long_log_is_binned(log, steps, bin_steps):
    cosines = random_cosines(steps=steps, pairs=1, layers=("conv",))
    cmap = read_published(log(as_log(cosines)), -0.1, ("a", "b"))
    series = cmap.layers[0].series
    assert cmap.bin_steps == bin_steps and len(series) == -(-steps // bin_steps) <= 512
    below = (cosines["conv"] < np.float32(-0.1)).ravel()
    assert series.tolist() == [below[i : i + bin_steps].sum() for i in range(0, steps, bin_steps)]
    width, by_pair = cmap.pair_bin_steps, cmap.layers[0].pair_series
    assert len(by_pair) == -(-steps // width) <= 64 and (steps <= 64 or len(by_pair) > 31)
    assert by_pair.ravel().tolist() == [below[i : i + width].sum() for i in range(0, steps, width)]


def test_a_log_without_tasks_is_not_split_by_pair(log):
    cosines = random_cosines()
    known, unknown = (read_published(log(as_log(cosines)), -0.1, tasks) for tasks in (TASKS, ()))
    assert unknown.scores() == known.scores() and unknown.scores(-0.3) == known.scores(-0.3)
    assert all(
        layer.conflicts is layer.observed is layer.below is layer.pair_series is None for layer in unknown.layers
    )
    assert (unknown.thresholds, unknown.pair_bin_steps, unknown.met) == ((), 0, None)
    assert (unknown.tasks, unknown.pairs, unknown.steps) == ((), [], 50)


def test_an_older_torch_s_file(log):
    path = log(as_log(random_cosines()), _use_new_zipfile_serialization=False)
    assert read_published(path, -0.1).steps == 50


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "holds a list, not one JSON object"),
        (["bn1", "conv1"], "holds a list, not one JSON object"),
        ({}, "holds 0 layers"),
        ("3", "holds a int, not one JSON object"),
        ({"conv": -1}, "score of 'conv' is -1, not a count"),
        ({"conv": 1.5}, "score of 'conv' is 1.5"),
        ({"conv": True}, "score of 'conv' is True"),
        ({"conv": "9"}, "score of 'conv' is '9'"),
        ({"conv": None}, "score of 'conv' is None"),
        ({"conv": {"a": 1}}, "score of 'conv'"),
        ('{"conv": NaN}', "holds NaN, which is no number"),
        ('{"conv": 3, "fc"', "not whole JSON"),
        ("", "not whole JSON"),
        ("\x00\x01", "not whole JSON"),
        ({"format": "recon conflict map", "version": 2}, "is a conflict map already"),
    ],
)
def test_a_file_that_is_no_table_of_scores(scores, content, message):
    path = scores(content)
    with pytest.raises(MapFileError, match=message) as error:
        read_published(path, -0.1)
    assert str(path) in str(error.value)


class Other:
    pass


@pytest.mark.parametrize(
    "content, message",
    [
        ({"cos": {"conv": Other()}}, "holds objects other than tensors"),
        ([torch.zeros(1)], "no table of cosines"),
        ({"weight": torch.zeros(3)}, "no table of cosines"),
        ({"cos": {}}, "no table of cosines"),
        ({"cos": [torch.zeros(1)]}, "no table of cosines"),
        ({"cos": {"conv": []}}, "no list of steps for 'conv'"),
        ({"cos": {"conv": torch.zeros(3, 1)}}, "no list of steps for 'conv'"),
        ({"cos": {3: [torch.zeros(1)]}}, "no list of steps for 3"),
        ({"cos": {"conv": [torch.zeros(())]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [torch.zeros(0)]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [0.5]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [torch.zeros(1, dtype=torch.int64)]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [torch.zeros(1), torch.zeros(3)]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [torch.zeros(1), 3]}}, "steps of 'conv' are not tensors"),
        ({"cos": {"conv": [torch.tensor([1.5])]}}, "are not cosines"),
        ({"cos": {"conv": [torch.tensor([float("-inf")])]}}, "are not cosines"),
        ({"cos": {"conv": [torch.zeros(2)]}}, "2 cosines a step, but no number of tasks has 2 pairs"),
        ({"cos": {"conv": [torch.zeros(1)], "fc": [torch.zeros(1)] * 2}}, "1 steps of 1 pairs, others 2 of 1"),
    ],
)
def test_a_file_that_is_no_log_of_cosines(log, content, message):
    path = log(content)
    with pytest.raises(MapFileError, match=message) as error:
        read_published(path, -0.1)
    assert str(path) in str(error.value)


def test_every_truncation_of_a_log_is_refused(log):
    path = log(as_log(random_cosines(steps=3)))
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(MapFileError, match="truncated"):
            read_published(path, -0.1)


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.pt"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(MapFileError, match="there is no such file"):
        read_published(tmp_path / name, -0.1)


@pytest.mark.parametrize("name", ["folder.json", "folder.pt"])
def test_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(MapFileError, match=name):
        read_published(tmp_path / name, -0.1)


def test_the_wrong_number_of_tasks(log):
    path = log(as_log(random_cosines(pairs=3)))
    with pytest.raises(MapFileError, match="cosines of 3 tasks, but 2 are named: a, b"):
        read_published(path, -0.1, ("a", "b"))


@pytest.mark.parametrize("tasks", [("a",), ("a", "a")])
def test_tasks_that_make_no_pair(scores, tasks):
    with pytest.raises(UsageError, match="two or more different"):
        read_published(scores(SCORES), -0.1, tasks)


@pytest.mark.parametrize("threshold", [0.1, -1.0, -0.105])
def test_a_threshold_off_the_grid(scores, threshold):
    with pytest.raises(UsageError, match=r"multiple of 0\.01"):
        read_published(scores(SCORES), threshold)


@pytest.mark.parametrize("name, said", [("x_S-0.1.json", -0.1), ("x_S0.0.json", 0.0), ("map-S-0.02.json", -0.02)])
def test_the_threshold_in_the_name_of_a_score_file_holds(scores, name, said):
    assert read_published(scores(SCORES, name), said).threshold == said
    with pytest.raises(UsageError, match="says that its scores were counted at"):
        read_published(scores(SCORES, name), -0.5)
