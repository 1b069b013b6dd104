"""How sure scores by count, rate and excess are, over any tasks: held against known true rates."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from recon.errors import UsageError
from tests.maps.from_cosines import floor_of, map_of, random_cosines, random_floors
from tests.maps.test_conflict_map import make_map, with_series

TASKS = ("a", "b", "c")
BY = ["count", "rate", "excess"]


def drawn(rates, rng, steps, coverage=1.0):
    """-0.5 in a conflict, 0.5 else, of (layers, pairs) rates; NaN where a pair did not meet."""
    met = rng.random((steps, rates.shape[1])) < coverage
    return {
        f"l{n}": np.where(met, np.where(rng.random((steps, len(of))) < of, -0.5, 0.5), np.nan)
        for n, of in enumerate(rates)
    }


def drawn_floors(rates, rng, steps):
    """Of (layers, tasks) rates."""
    across = np.zeros((steps, 2, len(list(combinations(range(rates.shape[1]), 2)))))
    return {
        f"l{n}": floor_of(np.where(rng.random((steps, len(of))) < of, -0.5, 0.5), across) for n, of in enumerate(rates)
    }


def calibrated(said, true):
    """Of what is said to hold with probability p, a share p holds, as exactly as so many cases tell."""
    said, true = np.concatenate(said), np.concatenate(true)
    for low, high in [(0, 0.05), (0.05, 0.35), (0.35, 0.65), (0.65, 1.01)]:
        within = (said >= low) & (said < high)
        p, cases = said[within].mean(), within.sum()
        assert cases > 30 and abs(true[within].mean() - p) < 0.02 + 2.5 * np.sqrt(p * (1 - p) / cases)


@pytest.mark.parametrize(("steps", "width"), [(15, 1), (90, 2)])
def test_rates_of_pairs_that_meet_now_and_then(steps, width):
    """Pairs that meet in all, half and a quarter of the steps; the scores are those of the tasks a and c."""
    said, true, held = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rates = rng.uniform(size=(14, 3))
        cmap = map_of(drawn(rates, rng, steps, [1, 0.5, 0.25]), TASKS, pair_bin_steps=width)
        said.append(list(cmap.top_k_probability(5, ("a", "c"), "rate").values()))
        true.append(np.argsort(np.argsort(-rates[:, 1])) < 5)
        low, high = np.array(list(cmap.intervals(0.9, ("c", "a"), "rate").values())).T
        held.append((low <= rates[:, 1]) & (rates[:, 1] <= high))
    calibrated(said, true)
    assert np.mean(held) == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("tasks", [("a", "b"), TASKS], ids=len)
def test_excess_over_a_floor_of_ten_steps(tasks):
    """Half of the layers are noise alone: no pair conflicts more than the larger floor of its tasks."""
    said, true, held, false, found = [], [], [], [], []
    first, second = np.triu_indices(len(tasks), k=1)
    for seed in range(36):
        rng = np.random.default_rng(seed)
        floors = rng.uniform(0, 0.5, size=(14, len(tasks)))
        noise = rng.random(14) < 0.5
        excess = np.where(noise[:, None], 0, rng.uniform(0, 0.5, size=(14, len(first))))
        rates = np.maximum(floors[:, first], floors[:, second]) + excess
        cmap = map_of(drawn(rates, rng, 40), tasks, floors=drawn_floors(floors, rng, 10))
        score = excess.mean(axis=1)
        said.append(list(cmap.top_k_probability(4, by="excess").values()))
        true.append(np.argsort(np.argsort(-score)) < 4)
        low, high = np.array(list(cmap.intervals(0.9, by="excess").values())).T
        held.append((low <= score) & (score <= high))
        sure = np.array(list(cmap.above_floor_probability().values())) >= 0.95
        false += sure[noise].tolist()
        found += sure[~noise].tolist()
    calibrated(said, true)
    assert 0.8 < np.mean(held) < 0.98
    assert np.mean(false) <= 0.06 and np.mean(found) > 0.25


def test_conflict_far_above_the_noise_and_noise_alone():
    rng = np.random.default_rng(0)
    rates, floors = np.array([[0.9], [0.4], [0.0]]), np.array([[0.1, 0.2], [0.4, 0.1], [0.2, 0.2]])
    cmap = map_of(drawn(rates, rng, 60), ("a", "b"), floors=drawn_floors(floors, rng, 30))
    fight, noise, agree = cmap.above_floor_probability().values()
    assert fight > 0.999 and 0.05 < noise < 0.95 and agree < 0.01
    low, high = zip(*cmap.intervals(by="excess").values(), strict=True)
    assert low[0] > 0.4 and low[1:] == (0, 0) and high[2] < 0.05


def test_one_pair_that_fights_is_found_among_many_that_do_not():
    """In the sum over the pairs it drowns: the others conflict less than their floors."""
    tasks, rng = tuple("abcdef"), np.random.default_rng(0)
    rates = np.full((2, 15), 0.1)
    rates[0, 4] = 0.95
    cmap = map_of(drawn(rates, rng, 60), tasks, floors=drawn_floors(np.full((2, 6), 0.3), rng, 30))
    one, none = cmap.above_floor_probability().values()
    assert one > 0.95 and none < 0.05
    assert max(cmap.above_floor_probability(tuple("abcd")).values()) < 0.05


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("tasks", [None, ("a", "c")], ids=["all", "two"])
def test_intervals_hold_the_score_and_probabilities_add_up(by, tasks):
    names = [f"l{n}" for n in range(6)]
    cmap = map_of(random_cosines(names, TASKS, 30), TASKS, floors=random_floors(names, TASKS, 8))
    scores, intervals = cmap.scores(tasks=tasks, by=by), cmap.intervals(tasks=tasks, by=by)
    for name in names:
        low, high = intervals[name]
        assert 0 <= low <= scores[name] <= high and type(low) is (int if by == "count" else float)
    assert intervals == cmap.intervals(tasks=tasks, by=by)  # the same each time
    assert sum(cmap.top_k_probability(2, tasks, by).values()) == pytest.approx(2)
    assert all(0 <= p <= 1 for p in cmap.above_mean_probability(tasks, by).values())


def test_ten_steps_do_not_settle_what_ten_of_ten_is():
    """A layer in conflict in all of ten steps, and another in nine: they may well be the other way round."""
    values = {
        f"l{n}": np.where(np.arange(10) < conflicts, -0.5, 0.5)[:, None] for n, conflicts in enumerate((10, 9, 1))
    }
    cmap = map_of(values, ("a", "b"))
    for by in ("count", "rate"):
        first, second, third = cmap.top_k_probability(1, by=by).values()
        assert 0.55 < first < 0.95 and 0.05 < second < 0.45 and third < 0.01
    low, high = cmap.intervals(by="rate")["l0"]
    assert high == 1 and low == pytest.approx(stats.beta(10.5, 0.5).ppf(0.05), abs=0.03)


def test_coverage_is_no_noise_of_a_rate():
    """A pair that meets in every other step and then conflicts: its rate is 1, as far as half of the steps know."""
    values = np.full((60, 1), np.nan)
    values[::2] = -0.5
    low, high = map_of({"fc": values, "x": values}, ("a", "b")).intervals(by="rate")["fc"]
    assert high == 1 and low == pytest.approx(stats.beta(30.5, 0.5).ppf(0.05), abs=0.02)


def test_a_pair_that_never_met_adds_nothing():
    rng = np.random.default_rng(0)
    values = drawn(rng.uniform(size=(5, 3)), rng, 40)
    for of in values.values():
        of[:, 2] = np.nan
    cmap = map_of(values, TASKS, floors=drawn_floors(np.full((5, 3), 0.2), rng, 10))
    assert all(high <= 2 / 3 for _, high in cmap.intervals(by="rate").values())
    assert set(cmap.intervals(tasks=("b", "c"), by="rate").values()) == {(0.0, 0.0)}
    assert set(cmap.intervals(tasks=("b", "c"), by="excess").values()) == {(0.0, 0.0)}
    assert np.isnan(list(cmap.above_floor_probability(("b", "c")).values())).all()


@pytest.mark.parametrize("by", ["rate", "excess"])
def test_an_older_map_knows_how_sure_it_is_of_counts_alone(by):
    cmap = with_series(make_map(tasks=TASKS))
    assert cmap.has_series and not cmap.has_pair_series and cmap.intervals()
    for ask in (lambda: cmap.intervals(by=by), lambda: cmap.top_k_probability(1, ("a", "b"))):
        with pytest.raises(UsageError, match=r"holds no counts by task pair over time.*older files, of chosen tasks"):
            ask()


def test_k_and_level_out_of_range():
    cmap = map_of(random_cosines(("conv", "fc"), TASKS, 20), TASKS)
    for by in ("count", "rate"):
        with pytest.raises(UsageError, match="k is 3, but there are 2 shared layers"):
            cmap.top_k_probability(3, by=by)
        with pytest.raises(UsageError, match="level is 90"):
            cmap.intervals(90, by=by)
