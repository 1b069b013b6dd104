"""Scores by count, rate and excess over any tasks, from the cosines themselves."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from recon.errors import UnknownNameError, UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import LayerFloor, threshold_bin, thresholds_around
from tests.maps.from_cosines import THRESHOLDS, map_of, random_cosines, random_floors
from tests.maps.test_conflict_map import make_map, score_map

LAYERS, TASKS = ("conv", "norm", "fc"), ("a", "b", "c", "d")
PAIRS = list(combinations(TASKS, 2))
SUBSETS = [None, ("a", "b", "c", "d"), ("c", "a", "d"), ("d", "b"), ("a", "b")]
ids = lambda tasks: "all" if tasks is None else "".join(tasks)  # noqa: E731


@pytest.fixture(scope="module")
def cosines():
    return random_cosines(LAYERS, TASKS, 40)


@pytest.fixture(scope="module")
def floors():
    return random_floors(LAYERS, TASKS, 9)


@pytest.fixture(scope="module")
def cmap(cosines, floors):
    return map_of(cosines, TASKS, floors=floors)


def by_hand(values, floor, threshold, tasks, by):
    """A layer's score from its cosines, pair by pair."""
    chosen = [(n, pair) for n, pair in enumerate(PAIRS) if tasks is None or set(pair) <= set(tasks)]
    total = 0.0
    for n, pair in chosen:
        seen = values[:, n][np.isfinite(values[:, n])]
        conflicts = (seen < threshold).sum()
        if by == "count":
            total += conflicts
        elif len(seen):
            rate = conflicts / len(seen)
            place = THRESHOLDS.index(threshold)
            own = [floor.conflicts[place][TASKS.index(task)] / floor.observed[TASKS.index(task)] for task in pair]
            total += (rate if by == "rate" else max(0.0, rate - max(own))) / len(chosen)
    return total


@pytest.mark.parametrize("tasks", SUBSETS, ids=ids)
@pytest.mark.parametrize("by", ["count", "rate", "excess"])
@pytest.mark.parametrize("threshold", [-0.1, -0.3, 0.0])
def test_scores_are_those_of_the_pairs_of_the_tasks(cmap, cosines, floors, tasks, by, threshold):
    scores = cmap.scores(threshold, tasks, by)
    expected = {name: by_hand(cosines[name], floors[name], threshold, tasks, by) for name in LAYERS}
    assert scores == pytest.approx(expected, rel=1e-12)
    assert all(type(score) is (int if by == "count" else float) for score in scores.values())
    assert cmap.ranking(threshold, tasks, by) == sorted(LAYERS, key=lambda name: -scores[name])


@pytest.mark.parametrize("tasks", SUBSETS, ids=ids)
def test_shares(cmap, cosines, tasks):
    chosen = [n for n, pair in enumerate(PAIRS) if tasks is None or set(pair) <= set(tasks)]
    for name, share in cmap.shares(tasks=tasks).items():
        seen = np.isfinite(cosines[name][:, chosen])
        expected = (cosines[name][:, chosen] < -0.1).sum() / max(1, seen.sum())
        assert share == pytest.approx(expected, rel=1e-12)
    assert cmap.shares(tasks=tasks, by="rate") == cmap.scores(tasks=tasks, by="rate")
    quarters = np.array_split(np.arange(40), 4)
    found = cmap.stage_shares(tasks)
    for row, values in zip(found, cosines.values(), strict=True):
        for share, quarter in zip(row, quarters, strict=True):
            part = values[quarter][:, chosen]
            seen = np.isfinite(part).sum()
            assert np.isnan(share) if seen == 0 else share == pytest.approx((part < -0.1).sum() / seen)


def test_pairs_of_each_layer(cmap, cosines, floors):
    for name in LAYERS:
        for n, pair in enumerate(PAIRS):
            assert cmap.observed()[name][pair] == np.isfinite(cosines[name][:, n]).sum()
            for threshold in THRESHOLDS:
                assert cmap.pair_scores(threshold)[name][pair] == (cosines[name][:, n] < threshold).sum()
        own = floors[name].conflicts[3] / floors[name].observed
        assert cmap.floor()[name] == dict(zip(TASKS, own, strict=True))
        across = floors[name].across_conflicts[0] / floors[name].across_observed
        assert cmap.across(-0.3)[name] == dict(zip(PAIRS, across, strict=True))


def test_with_even_coverage_the_rate_ranks_as_the_count():
    cmap = map_of(random_cosines([f"l{i}" for i in range(12)], TASKS[:2], 60, missing=0), TASKS[:2])
    assert cmap.ranking(by="rate") == cmap.ranking()
    assert cmap.scores(by="rate") == {name: score / 60 for name, score in cmap.scores().items()}


def test_a_layer_that_conflicts_in_all_of_its_ten_steps_ranks_above_one_at_38_percent_of_ninety():
    rarely, often = np.full((100, 1), np.nan), np.full((100, 1), np.nan)
    rarely[:10] = -1.0
    often[10:] = 0.5
    often[10:44] = -0.5
    cmap = map_of({"often": often, "rarely": rarely}, ("a", "b"))
    assert cmap.ranking() == ["often", "rarely"]
    assert cmap.ranking(by="rate") == ["rarely", "often"]
    assert cmap.scores(by="rate") == pytest.approx({"often": 34 / 90, "rarely": 1.0})


def test_a_ranking_for_two_tasks_leaves_the_fights_of_a_third_out():
    """In `a` the third task fights with both, in `b` the two with each other."""
    fight, agree = np.full(50, -1.0), np.full(50, 1.0)
    cosines = {"a": np.stack([agree, fight, fight], axis=1), "b": np.stack([fight, agree, agree], axis=1)}
    cmap = map_of(cosines, ("seg", "depth", "edge"))
    assert cmap.scores() == {"a": 100, "b": 50}
    for by in ("count", "rate"):
        assert cmap.ranking(tasks=("seg", "depth"), by=by) == ["b", "a"]
    assert cmap.scores(tasks=("depth", "seg")) == {"a": 0, "b": 50}


def test_pairs_that_never_or_rarely_met_are_named(cmap):
    assert cmap.never_met() == [("a", "b")] and cmap.never_met(("b", "c", "d")) == []
    assert list(cmap.rarely_met()) == [("a", "c")] and cmap.rarely_met(("b", "c")) == {}
    assert cmap.rarely_met()["a", "c"] == cmap.observed()["conv"]["a", "c"]


@pytest.mark.parametrize(
    ("steps", "rare"),
    [
        ([100, 100, 100], []),
        ([8, 8, 8], []),  # little is known of any; that is what intervals say
        ([100, 19, 20], [1]),
        ([30, 19, 12], [2]),
        ([1000, 99, 100], [1]),
        ([1000, 0, 1], [2]),
    ],
    ids=str,
)
def test_a_pair_is_rare_beside_others(steps, rare):
    values = np.full((max(steps), 3), np.nan)
    for n, count in enumerate(steps):
        values[:count, n] = 0.3
    cmap = map_of({"fc": values}, ("a", "b", "c"))
    assert cmap.rarely_met() == {cmap.pairs[n]: steps[n] for n in rare}
    assert cmap.never_met() == [cmap.pairs[n] for n in range(3) if steps[n] == 0]


def test_a_task_that_the_floor_never_saw_has_none(cosines, floors):
    unseen = floors["norm"]
    observed, conflicts = unseen.observed.copy(), unseen.conflicts.copy()
    observed[3] = conflicts[:, 3] = 0
    partly = {**floors, "norm": replace(unseen, observed=observed, conflicts=conflicts)}
    del partly["fc"]
    cmap = map_of(cosines, TASKS, floors=partly)
    met = [pair for pair in PAIRS if pair != ("a", "b")]
    assert cmap.without_floor() == {"norm": [pair for pair in met if "d" in pair], "fc": met}
    assert cmap.without_floor(("b", "c")) == {"fc": [("b", "c")]}
    assert cmap.floor()["fc"] == {} and set(cmap.floor()["norm"]) == {"a", "b", "c"}
    assert cmap.scores(by="excess")["fc"] == 0
    assert cmap.scores(tasks=("c", "d"), by="excess")["norm"] == 0
    expected = by_hand(cosines["conv"], floors["conv"], -0.1, None, "excess")
    assert cmap.scores(by="excess")["conv"] == pytest.approx(expected)
    probabilities = cmap.above_floor_probability(("c", "d"))
    assert np.isnan([probabilities["norm"], probabilities["fc"]]).all() and 0 <= probabilities["conv"] <= 1


def test_thresholds_around_s():
    assert thresholds_around(-0.1) == THRESHOLDS
    assert thresholds_around(0) == (-0.2, -0.1, -0.05, 0.0)
    assert thresholds_around(-0.95) == (-0.95, -0.9, -0.85, 0.0)
    for hundredths in range(-99, 1):
        found = thresholds_around(hundredths / 100)
        assert hundredths / 100 in found and 0.0 in found and sorted(set(found)) == list(found)
        assert [threshold_bin(s) for s in found]


def test_what_a_map_does_not_hold_is_refused(cmap):
    kept = r"counts by task pair at S = -0\.3, -0\.2, -0\.15, -0\.1, -0\.05, 0, not at -0\.12"
    for ask in (
        lambda: cmap.scores(-0.12, ("a", "b")),
        lambda: cmap.ranking(-0.12, by="rate"),
        lambda: cmap.pair_scores(-0.12),
        lambda: cmap.floor(-0.12),
        lambda: cmap.scores(-0.12, by="excess"),
    ):
        with pytest.raises(UsageError, match=kept):
            ask()
    assert cmap.scores(-0.12) == cmap.scores(-0.12, TASKS[::-1])  # all pairs together, at any
    for ask in (lambda: make_map().scores(by="excess"), make_map().floor, make_map().above_floor_probability):
        with pytest.raises(UsageError, match=r"no noise floor|no counts by task pair over time"):
            ask()


def test_an_older_map_of_three_tasks_answers_at_its_own_threshold():
    cmap = make_map(tasks=("a", "b", "c"))
    pairs = cmap.layers[0].conflicts.sum(axis=0)
    assert cmap.scores(tasks=("a", "c"))["conv"] == cmap.scores(-0.1, ("a", "c"))["conv"] == pairs[1]
    with pytest.raises(UsageError, match=r"at S = -0\.1, not at -0\.2"):
        cmap.scores(-0.2, ("a", "c"))


def test_a_map_of_two_tasks_answers_by_rate_at_any_threshold():
    cmap = make_map()
    for threshold in (-0.5, -0.12, 0):
        assert cmap.scores(threshold, by="rate") == {n: s / 40 for n, s in cmap.scores(threshold).items()}


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        (("a", "z"), UnknownNameError, "no task in this map named 'z'"),
        (("a",), UsageError, "Name two or more different ones of"),
        ((), UsageError, "Name two or more"),
        (("a", "b", "a"), UsageError, "Name two or more"),
        ("ab", UsageError, "Name two or more"),
    ],
    ids=str,
)
def test_wrong_tasks(cmap, tasks, error, words):
    for ask in (cmap.intervals, cmap.shares, cmap.ranking, cmap.never_met, cmap.rarely_met, cmap.stage_shares):
        with pytest.raises(error, match=words):
            ask(tasks=tasks)


@pytest.mark.parametrize("by", ["rates", "", None])
def test_an_unknown_measure(cmap, by):
    for ask in (cmap.scores, cmap.intervals, cmap.ranking, lambda by: cmap.top_k_probability(1, by=by)):
        with pytest.raises(UsageError, match="Choose 'count', 'rate', 'excess'"):
            ask(by=by)


def test_a_map_without_task_names_answers_for_all_alone():
    nameless, scores = score_map({"fc": 3, "conv": 9}), score_map({"fc": 3, "conv": 9}, tasks=("a", "b"))
    assert nameless.never_met() == [] and scores.never_met() == [] and scores.rarely_met() == {}
    assert scores.scores(tasks=("b", "a")) == nameless.scores() == {"fc": 3, "conv": 9}
    with pytest.raises(UsageError, match=r"imported without their names\. Leave the tasks out, or import it again"):
        nameless.scores(tasks=("a", "b"))
    for cmap in (nameless, scores):
        for ask in (lambda: cmap.scores(by="rate"), cmap.observed, cmap.pair_scores):  # noqa: B023
            with pytest.raises(UsageError, match="no counts by task pair, only sums over all of them"):
                ask()


def test_a_floor_of_nothing_is_none(cosines):
    nothing = LayerFloor(*(np.zeros(shape, dtype=np.int64) for shape in (4, (6, 4), 6, (6, 6))))
    assert not map_of(cosines, TASKS, floors={"fc": nothing}).has_floor
    assert not ConflictMap(("a", "b"), -0.1, None, None, (), []).has_floor
