import itertools
import math

import numpy as np
import pytest
from scipy import stats

from recon.errors import MapMismatchError, UnknownNameError, UsageError
from recon.maps.names import renamed
from tests.maps.from_cosines import map_of, random_cosines
from tests.maps.test_conflict_map import make_map, score_map


def test_a_hand_made_case():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: sum of d^2 = 4, so rho = 1 - 6*4/(5*24) = 0.8; 2 of 10 pairs swapped, so
    # tau = (8 - 2) / 10 = 0.6.
    first = score_map({"a": 50, "b": 40, "c": 30, "d": 20, "e": 10})
    found = first.compare(score_map({"a": 7, "b": 8, "c": 5, "d": 6, "e": 1}), top_k=3)
    assert found.spearman == pytest.approx(0.8)
    assert found.kendall == pytest.approx(0.6)
    assert found.mean_shift == pytest.approx(4 / 5)
    assert found.overlap == ("a", "b") and found.jaccard == pytest.approx(2 / 4)
    assert [(layer.name, layer.ranks, layer.shift) for layer in found.layers] == [
        ("a", (1, 2), 1),
        ("b", (2, 1), -1),
        ("c", (3, 4), 1),
        ("d", (4, 3), -1),
        ("e", (5, 5), 0),
    ]
    assert [layer.scores for layer in found.layers] == [(50, 7), (40, 8), (30, 5), (20, 6), (10, 1)]


def kendall_by_definition(x, y):
    """tau-b of Kendall (1945): concordant less discordant pairs, over the geometric mean of the untied pairs."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1])


@pytest.mark.parametrize("seed", range(5))
def test_correlations_with_ties_follow_their_definitions(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 8, size=(2, 20))
    found = score_map(named(x)).compare(score_map(named(y)))
    assert found.kendall == pytest.approx(kendall_by_definition(x, y))
    # Spearman's is Pearson's of the ranks, ties at their mean rank.
    ranks = [[np.mean(np.flatnonzero(np.sort(-v) == -e)) + 1 for e in v] for v in (x, y)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert {layer.name: layer.ranks for layer in found.layers} == dict(
        zip(named(x), zip(*ranks, strict=True), strict=True)
    )


def named(scores):
    return {f"layer{i}": int(score) for i, score in enumerate(scores)}


@pytest.mark.parametrize("seed", range(3))
def test_a_map_agrees_with_itself(seed):
    cmap = make_map(layers=[f"layer{i}" for i in range(12)], seed=seed, tasks=("a", "b", "c"))
    for k in range(1, 13):
        found = cmap.compare(cmap, top_k=k)
        assert (found.spearman, found.kendall, found.mean_shift, found.jaccard) == (
            pytest.approx(1),
            pytest.approx(1),
            0,
            1,
        )
        assert set(found.overlap) == set(cmap.ranking()[:k])
    assert found.only == ((), ())


def test_swapping_the_maps_mirrors_the_comparison():
    one, other = (make_map(layers=[f"layer{i}" for i in range(12)], seed=seed) for seed in (1, 2))
    there, back = one.compare(other), other.compare(one)
    assert there.spearman == pytest.approx(back.spearman) and there.kendall == pytest.approx(back.kendall)
    assert there.mean_shift == back.mean_shift and set(there.overlap) == set(back.overlap)
    assert {layer.name: layer.shift for layer in there.layers} == {layer.name: -layer.shift for layer in back.layers}


def test_opposite_orders():
    found = score_map({"a": 1, "b": 2, "c": 3, "d": 4}).compare(score_map({"a": 4, "b": 3, "c": 2, "d": 1}), top_k=2)
    assert (found.spearman, found.kendall, found.jaccard) == (pytest.approx(-1), pytest.approx(-1), 0)


def test_only_the_common_layers_are_ranked():
    first, second = score_map({"x": 100, "a": 3, "b": 2, "c": 1}), score_map({"c": 1, "b": 2, "y": 50, "a": 3, "z": 0})
    found = first.compare(second)
    assert [layer.name for layer in found.layers] == ["a", "b", "c"]
    assert found.only == (("x",), ("y", "z"))
    assert found.layers[0].ranks == (1, 1) and found.kendall == pytest.approx(1)


def test_maps_of_other_tasks_and_thresholds_compare():
    one, other = make_map(threshold=-0.1), make_map(tasks=("x", "y", "z"), threshold=0.0, seed=3, steps=80)
    found = one.compare(other)
    assert {layer.name: layer.scores for layer in found.layers} == {
        name: (one.scores(-0.1)[name], other.scores(0.0)[name]) for name in one.scores()
    }
    at_another = one.compare(other, threshold=-0.5)
    assert {layer.name: layer.shares for layer in at_another.layers} == {
        name: (one.shares(-0.5)[name], other.shares(-0.5)[name]) for name in one.scores()
    }


def test_shares_of_a_map_of_scores_are_unknown():
    shares = make_map().compare(score_map({"conv": 3, "fc": 2})).layers[0].shares
    assert not math.isnan(shares[0]) and math.isnan(shares[1])


def test_k_is_a_quarter_of_the_common_layers():
    assert (
        make_map(layers=[f"layer{i}" for i in range(13)])
        .compare(make_map(layers=[f"layer{i}" for i in range(12)]))
        .top_k
        == 3
    )
    assert make_map().compare(make_map()).top_k == 1


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_out_of_range(k):
    with pytest.raises(UsageError, match="between 1 and 3"):
        make_map().compare(make_map(seed=1), top_k=k)


def test_equal_scores_and_single_layers_have_no_correlation():
    flat = score_map({"a": 1, "b": 1, "c": 1})
    assert math.isnan(flat.compare(flat).spearman) and math.isnan(flat.compare(flat).kendall)
    single = score_map({"a": 1})
    assert math.isnan(single.compare(single).spearman) and single.compare(single).jaccard == 1


def test_ties_fall_alike_on_both_sides():
    one, other = score_map({"a": 1, "b": 1, "c": 1, "d": 0}), score_map({"d": 0, "c": 1, "b": 1, "a": 1})
    assert one.compare(other, top_k=2).overlap == ("a", "b")


def test_a_rename_brings_the_second_map_to_the_first():
    one, other = make_map(layers=("conv", "fc")), make_map(layers=("net.conv", "net.fc"), seed=1)
    found = one.compare(other, rename={"net": ""})
    assert {layer.name for layer in found.layers} == {"conv", "fc"}
    with pytest.raises(UnknownNameError, match="'net'"):
        one.compare(other, rename={"nett": ""})


def test_no_common_layer_suggests_a_rename_or_names_the_nearest():
    one, other = make_map(layers=("conv", "fc")), make_map(layers=("net.conv", "net.fc"))
    with pytest.raises(MapMismatchError, match=r"no layer in common.*--rename 'net='"):
        one.compare(other)
    with pytest.raises(MapMismatchError, match="--rename '=net'"):
        other.compare(one)
    with pytest.raises(MapMismatchError, match="'conv1' is like 'conv'"):
        one.compare(make_map(layers=("conv1", "tail")))
    with pytest.raises(MapMismatchError, match="different architectures"):
        one.compare(make_map(layers=("x", "y")))


def test_maps_compare_by_rate_and_over_chosen_tasks():
    names = [f"l{n}" for n in range(9)]
    one, other = (map_of(random_cosines(names, ("a", "b", "c"), 40, seed), ("a", "b", "c")) for seed in (0, 1))
    found = one.compare(other, tasks=("b", "c"), by="rate", top_k=3)
    rates = [cmap.scores(tasks=("b", "c"), by="rate") for cmap in (one, other)]
    expected = stats.spearmanr(*([of[name] for name in names] for of in rates)).statistic
    assert found.spearman == pytest.approx(expected)
    assert all(layer.scores == layer.shares == tuple(of[layer.name] for of in rates) for layer in found.layers)
    tops = [set(cmap.ranking(None, ("b", "c"), "rate")[:3]) for cmap in (one, other)]
    assert set(found.overlap) == tops[0] & tops[1]
    with pytest.raises(UnknownNameError, match="no task in this map named 'z'"):
        one.compare(other, tasks=("b", "z"))


def test_a_rename_renames_the_members_of_a_unit():
    cmap = make_map(layers=("net.conv", "net.norm"))
    cmap.layers[0].members = ("net.conv.down", "other.up")
    found = renamed(cmap, {"net": "backbone"})
    assert found.layers[0].name == "backbone.conv" and found.layers[0].members == ("backbone.conv.down", "other.up")
