import matplotlib.image
import numpy as np
import pytest

from recon.errors import UsageError
from recon.experiments.pictures import before_after, weights_over_steps
from recon.maps.pictures.heatmap import heatmap
from recon.support.timing import step_seconds
from tests.maps.test_conflict_map import make_map


def test_a_heatmap_shows_every_layer(tmp_path):
    heatmap(make_map(), tmp_path / "few.png", branched=["norm"])
    heatmap(make_map(layers=[f"layer{i}" for i in range(60)]), tmp_path / "many.png")
    few, many = (matplotlib.image.imread(tmp_path / name) for name in ("few.png", "many.png"))
    assert many.shape[0] > 4 * few.shape[0] and few.std() > 0


def test_stages_without_observations_stay_blank(tmp_path):
    cmap = make_map()
    for layer in cmap.layers:
        layer.conflicts = np.zeros_like(layer.conflicts)
        layer.observed = np.zeros_like(layer.observed)
    heatmap(cmap, tmp_path / "blank.png")
    assert (tmp_path / "blank.png").stat().st_size > 0


def test_bars_before_and_after(tmp_path):
    before_after({"a": 0.5, "b": 0.2, "gone": 1.0}, {"a": 0.1, "b": 0.3}, tmp_path / "bars.png")
    assert matplotlib.image.imread(tmp_path / "bars.png").std() > 0


def test_weights_over_steps(tmp_path):
    records = [{"step": n, "weights": {"a": 1 / n, "b": None if n == 3 else 1.5}} for n in range(1, 9)]
    weights_over_steps([*records, {"number": 1, "weights": {"a": 1.0}}], ["a", "b"], tmp_path / "weights.png")
    assert matplotlib.image.imread(tmp_path / "weights.png").std() > 0


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot make the folder"):
        heatmap(make_map(), tmp_path / "file" / "map.png")


def test_steps_are_timed_in_turn():
    calls = []
    seconds = step_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"} and all(value >= 0 for value in seconds.values())
