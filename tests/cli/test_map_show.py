from dataclasses import replace

import numpy as np
import pytest

from recon.errors import UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import BINS, LayerConflicts
from recon.maps.noise.confidence import interval, resample, top_k_share
from recon_cli.texts.map_show import ranked_layers, ranking_table, unsure_why

RATES = {"stem": 0.0, "a": 0.3, "b": 0.82, "c": 0.5, "d": 0.56, "e": 0.9}
STEPS = 200


@pytest.fixture
def cmap():
    rng = np.random.default_rng(0)
    layers = []
    for name, rate in RATES.items():
        series = (rng.random(STEPS) < rate).astype(np.int64)
        histogram = np.zeros(BINS, dtype=np.int64)
        histogram[[50, 150]] = series.sum(), STEPS - series.sum()
        quarters = series.reshape(4, 1, -1).sum(axis=2)
        observed = np.full_like(quarters, STEPS // 4)
        layers.append(LayerConflicts(name, "Linear", {"weight": [4, 1000]}, histogram, quarters, observed, series))
    return ConflictMap(("x", "y"), -0.1, STEPS, 0, (50,) * 4, layers, {}, bin_steps=1)


def without_series(cmap):
    return replace(cmap, layers=[replace(layer, series=None) for layer in cmap.layers], bin_steps=0)


def test_intervals_and_probabilities_go_to_their_layers(cmap):
    layers = ranked_layers(cmap, top_k=3)
    series = np.stack([layer.series for layer in cmap.layers], axis=1)
    draws = resample(series, STEPS)
    at = dict(zip(RATES, zip(interval(draws, 0.9).tolist(), top_k_share(draws, 3), strict=True), strict=True))
    assert [layer["name"] for layer in layers] == cmap.ranking()
    for layer in layers:
        ends, probability = at[layer["name"]]
        low, high = layer["interval"]
        assert low <= layer["score"] <= high and [low, high] == pytest.approx(ends, abs=1)
        assert layer["top_k_probability"] == pytest.approx(probability, abs=1e-3)


def test_the_line_at_k_and_what_is_within_noise_of_it(cmap):
    text = ranking_table(ranked_layers(cmap, top_k=3), top_k=3)
    header, rule, *rest = text.splitlines()
    assert "90% interval" in header and "in top 3" in header
    assert rest[3] == rule and rest.count(rule) == 1
    assert [line.split()[1] for line in rest[:3]] == cmap.ranking()[:3]
    assert rest[-1] == f"Within noise of the cut at K=3 (~): {', '.join(cmap.ranking()[2:4])}."
    assert {line.split()[1] for line in rest[:-1] if "~" in line} == {"c", "d"}


def test_a_clear_cut(cmap):
    text = ranking_table(ranked_layers(cmap, top_k=2), top_k=2)
    assert text.endswith("No layer is within noise of the cut at K=2.") and "~" not in text


def test_noise_is_told_of_layers_that_are_not_shown(cmap):
    text = ranking_table(ranked_layers(cmap, top_k=3), top=1, top_k=3)
    _, rule, *rest = text.splitlines()
    assert rule not in rest and rest[1] == "... and 5 more"
    assert rest[2].startswith("Within noise of the cut at K=3 (~): ")


@pytest.mark.parametrize("k", [1, 6])
def test_the_line_at_the_ends(cmap, k):
    _, rule, *rest = ranking_table(ranked_layers(cmap, top_k=k), top_k=k).splitlines()
    assert [number for number, line in enumerate(rest) if line == rule] == ([1] if k == 1 else [])


def test_without_a_cut_there_are_intervals_alone(cmap):
    layers = ranked_layers(cmap)
    assert all("interval" in layer and "top_k_probability" not in layer for layer in layers)
    text = ranking_table(layers, 3, quarters=True)
    assert "90% interval" in text and "in top" not in text and "noise" not in text
    assert text.splitlines()[0].split()[-4:] == ["q1", "q2", "q3", "q4"]
    assert text.endswith("... and 3 more")


def test_no_confidence_without_a_series_or_at_another_threshold(cmap):
    one_bin = replace(cmap, layers=[replace(layer, series=layer.series.sum(keepdims=True)) for layer in cmap.layers])
    for layers in (
        ranked_layers(without_series(cmap), top_k=3),
        ranked_layers(cmap, -0.2, top_k=3),
        ranked_layers(one_bin, top_k=3),
    ):
        assert not {"interval", "top_k_probability"} & layers[0].keys()
        header, rule, *rest = ranking_table(layers, top_k=3).splitlines()
        assert rest[3] == rule and "interval" not in header and "noise" not in rest[-1]
    assert "interval" in ranked_layers(cmap, -0.1)[0]


def test_scores_alone(cmap):
    layers = [LayerConflicts(name, "", {}, None, None, None, score=3) for name in RATES]
    imported = ConflictMap((), -0.1, None, None, (), layers)
    text = ranking_table(ranked_layers(imported, top_k=2), quarters=True, top_k=2)
    assert text.splitlines()[2].split() == ["1", "stem", "-", "-", "3", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize("k", [0, 7])
def test_a_cut_outside_the_ranking(cmap, k):
    for some in (cmap, without_series(cmap)):
        with pytest.raises(UsageError, match=f"top {k} of 6 shared layers: choose 1 to 6"):
            ranked_layers(some, top_k=k)


def test_why_a_ranking_does_not_say_how_sure_it_is(cmap):
    assert unsure_why(cmap) == unsure_why(cmap, cmap.threshold) == ""
    assert "only at its own S=-0.1" in unsure_why(cmap, -0.2)
    layers = [LayerConflicts(name, "", {}, None, None, None, score=3) for name in RATES]
    assert "merged and imported" in unsure_why(ConflictMap((), -0.1, None, None, (), layers))
    assert "one step" in unsure_why(ConflictMap((), -0.1, 1, 0, (), layers))
