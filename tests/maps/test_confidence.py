from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from recon.errors import UsageError
from recon.maps.noise.confidence import (
    above_mean_share,
    block_length,
    expected_overlap,
    interval,
    resample,
    top_k_share,
)
from recon.profiling.stability import StableRanking

NORMAL = np.sort(np.random.default_rng(0).standard_normal(200_000))


def ar1(bins, layers, rho, rng):
    """Standard normal in each bin, correlated in time and, by 0.3, between layers."""
    shocks = np.sqrt(0.7) * rng.standard_normal((bins, layers)) + np.sqrt(0.3) * rng.standard_normal((bins, 1))
    rows = [shocks[0]]
    for shock in shocks[1:]:
        rows.append(rho * rows[-1] + np.sqrt(1 - rho**2) * shock)
    return np.array(rows)


def conflicts(shares, rho, rng):
    """(B, L) conflicts, each with the probability that `shares` has there."""
    quantiles = NORMAL[np.clip((shares * len(NORMAL)).astype(int), 0, len(NORMAL) - 1)]
    return (ar1(*shares.shape, rho, rng) < quantiles).astype(np.int64)


def flat(bins, layers):
    return np.tile(np.linspace(0.1, 0.8, layers), (bins, 1))


def settling(bins, layers):
    """Everything conflicts at first; then the layers part and go on drifting."""
    time = np.arange(bins)[:, None]
    later = np.linspace(0.2, 0.7, layers) + 0.1 * time / bins * np.where(np.arange(layers) % 2, 1, -1)
    return later + (0.95 - later) * np.exp(-time / (bins / 6))


def plain_intervals(series):
    """The plain bootstrap's, which takes the steps for independent."""
    times_drawn = np.random.default_rng(0).multinomial(len(series), np.full(len(series), 1 / len(series)), size=400)
    return np.quantile(times_drawn @ series, [0.05, 0.95], axis=0).T


def intervals(series, trials=None, level=0.9):
    """(L, 2) of layers observed once in each bin, when not given."""
    return interval(resample(series, len(series) if trials is None else trials), level)


def coverage(of, shares, rho, repeats=200):
    held = []
    for seed in range(repeats):
        low, high = of(conflicts(shares, rho, np.random.default_rng(seed))).T
        held.append(((low <= shares.sum(axis=0)) & (shares.sum(axis=0) <= high)).mean())
    return np.mean(held)


@pytest.mark.parametrize("shares", [flat(200, 12), settling(200, 12)], ids=["flat", "settling"])
def test_intervals_cover_the_expected_scores(shares):
    assert 0.86 <= coverage(intervals, shares, rho=0) <= 0.94
    assert 0.82 <= coverage(intervals, shares, rho=0.5) <= 0.94
    assert coverage(plain_intervals, shares, rho=0.5) <= 0.78


def test_quarters_keep_drift_out_of_the_noise():
    shares = np.repeat([0.9, 0.6, 0.3, 0.1], 50)[:, None] + np.zeros((200, 3))
    series = conflicts(shares, 0, np.random.default_rng(0))
    binomial = np.sqrt((shares * (1 - shares)).sum(axis=0))
    assert np.allclose(resample(series, 200).std(axis=0), binomial, rtol=0.25)
    assert (resample(series[np.random.default_rng(1).permutation(200)], 200).std(axis=0) > 1.2 * binomial).all()


def test_resampled_scores_centre_on_the_score_and_share_the_noise_of_the_steps():
    rng = np.random.default_rng(0)
    one = conflicts(flat(300, 1), 0.3, rng)
    scores = resample(np.hstack([one, one, conflicts(flat(300, 1), 0.3, rng)]), 300, draws=4000)
    assert np.corrcoef(scores[:, 0], scores[:, 1])[0, 1] > 0.97  # but for what is not known of either
    assert abs(np.corrcoef(scores[:, 0], scores[:, 2])[0, 1]) < 0.35
    assert abs(scores[:, 0].mean() - one.sum()) < 0.1 * scores[:, 0].std()


def test_block_length_is_the_plug_in_of_an_ar1_process():
    rng = np.random.default_rng(0)
    for rho in (0.6, 0.8):
        series = np.rint(100 + 20 * ar1(512, 40, rho, rng)).astype(np.int64)
        assert block_length(series) == pytest.approx((np.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3) * 8, abs=1.5)
    assert block_length(rng.integers(2, size=(512, 40))) == 8
    assert block_length(np.tile(np.arange(512)[:, None], (1, 3))) == 8  # a trend is no dependence
    walk = np.abs(np.cumsum(rng.choice([-1, 1], size=(64, 5)), axis=0))
    assert block_length(walk) <= 16


def test_probabilities_are_calibrated():
    """Of layers said to be in the top K with probability p, a share p is there by its true rate."""
    said, true = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shares = np.tile(rng.uniform(0.3, 0.6, size=16), (150, 1))
        said.append(top_k_share(resample(conflicts(shares, 0.4, rng), 150), 5))
        true.append(np.argsort(np.argsort(-shares[0])) < 5)
    said, true = np.concatenate(said), np.concatenate(true)
    for low, high in [(0.02, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.98)]:
        within = (said >= low) & (said < high)
        assert within.sum() > 50 and true[within].mean() == pytest.approx(said[within].mean(), abs=0.1)


def test_layers_that_never_conflict_share_what_is_left_of_the_top():
    series = np.zeros((80, 6), dtype=np.int64)
    series[:, 4] = 1
    series[::2, 1] = 1
    assert np.allclose(top_k_share(resample(series, 80), 4), [0.5, 1, 0.5, 0.5, 1, 0.5], atol=0.05)


def test_layers_that_tie_at_the_cut_share_its_places():
    draws = np.array([[3.0, 1, 1, 1], [0, 2, 2, 1]])
    assert np.allclose(top_k_share(draws, 2), [0.5, 2 / 3, 2 / 3, 1 / 6])


@pytest.mark.parametrize("steps", [4, 10, 40])
def test_a_layer_that_never_or_always_conflicted_is_known_as_well_as_its_steps_allow(steps):
    """Of independent steps: Beta(1/2, n + 1/2), Jeffreys' posterior of a rate of which n trials show no case."""
    series = np.zeros((steps, 40), dtype=np.int64)
    series[:, 20:] = 1
    posterior = stats.beta(0.5, steps + 0.5)
    draws = resample(series, steps, 4000) / steps
    for level in (0.1, 0.5, 0.9, 0.95):
        assert np.mean(draws[:, :20] <= posterior.ppf(level)) == pytest.approx(level, abs=0.01)
        assert np.mean(draws[:, 20:] >= 1 - posterior.ppf(level)) == pytest.approx(level, abs=0.01)


def test_pairs_that_always_agree_are_one_witness_and_not_many():
    """Ten pairs in each step: as much as one pair says if they move together, ten times as much if they do not."""
    rng = np.random.default_rng(0)
    together = 10 * rng.integers(2, size=(100, 8))
    apart = rng.binomial(10, 0.5, size=(100, 8))
    together[:, 0] = apart[:, 0] = 0
    highest = [np.quantile(resample(series, 1000)[:, 0] / 1000, 0.9) for series in (together, apart)]
    assert highest[0] == pytest.approx(stats.beta(0.5, 100.5).ppf(0.9), rel=0.4)
    assert highest[1] == pytest.approx(stats.beta(0.5, 1000.5).ppf(0.9), rel=0.4)


@pytest.mark.parametrize("rho", [0, 0.4])
@pytest.mark.parametrize("steps", [6, 10, 20])
def test_probabilities_are_calibrated_after_few_steps(steps, rho):
    """As `test_probabilities_are_calibrated`; many layers conflict in nearly all or nearly none of the steps."""
    said, true, held = [], [], []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        rates = rng.beta(0.5, 0.5, size=16)
        draws = resample(conflicts(np.tile(rates, (steps, 1)), rho, rng), steps, 300)
        said.append(top_k_share(draws, 5))
        true.append(np.argsort(np.argsort(-rates)) < 5)
        low, high = interval(draws, 0.9).T / steps
        held.append((low <= rates) & (rates <= high))
    said, true = np.concatenate(said), np.concatenate(true)
    assert np.mean(held) == pytest.approx(0.9, abs=0.06)
    for low, high, close in [
        (0, 0.1, 0.03),
        (0.1, 0.35, 0.08),
        (0.35, 0.65, 0.12),
        (0.65, 0.9, 0.08),
        (0.9, 1.01, 0.05),
    ]:
        within = (said >= low) & (said < high)
        assert within.sum() > 50 and true[within].mean() == pytest.approx(said[within].mean(), abs=close)


def overlaps(make_shares, bins, future, k, repeats=100, layers=20):
    """The expected overlap and what it then was, in the mean over many runs."""
    expected, actual = [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        series = conflicts(make_shares(bins + future, layers, rng), 0.3, rng)
        today, later = (
            set(np.argsort(-scores, kind="stable")[:k]) for scores in (series[:bins].sum(axis=0), series.sum(axis=0))
        )
        expected.append(expected_overlap(series[:bins], k, future))
        actual.append(len(today & later) / len(today | later))
    return np.mean(expected), np.mean(actual)


def random_flat(bins, layers, rng):
    return np.tile(rng.uniform(0.1, 0.9, size=layers), (bins, 1))


def random_settling(bins, layers, rng):
    time = np.arange(bins)[:, None]
    start, end = rng.uniform(0.85, 0.98, size=layers), rng.uniform(0.1, 0.9, size=layers)
    return end + (start - end) * np.exp(-time / 60)


def random_walk(bins, layers, rng):
    steps = rng.standard_normal((bins, layers)) / np.sqrt(300)
    return 1 / (1 + np.exp(-rng.standard_normal(layers) - np.cumsum(steps, axis=0)))


@pytest.mark.parametrize("make_shares", [random_flat, random_settling, random_walk])
@pytest.mark.parametrize(("bins", "future"), [(60, 60), (60, 300), (200, 200), (300, 60)])
def test_expected_overlap_is_what_a_longer_run_then_shows(make_shares, bins, future):
    expected, actual = overlaps(make_shares, bins, future, k=6)
    assert actual - 0.15 < expected < actual + 0.08  # hope is worse than caution: it stops too soon


def test_rare_conflicts_do_not_settle_a_ranking():
    series = np.zeros((50, 20), dtype=np.int64)
    assert expected_overlap(series, 8, 400) < 0.5
    series[::12, :8] = 1  # eight layers with a few conflicts, twelve with none so far
    assert expected_overlap(series, 8, 400) < 0.9
    series[::2, :8] = 1
    assert expected_overlap(series, 8, 400) > 0.99


def test_expected_overlap_at_the_ends():
    series = conflicts(flat(60, 5), 0.3, np.random.default_rng(0))
    assert expected_overlap(series, 5) == pytest.approx(1)
    assert expected_overlap(series, 2, 0) == 1
    assert expected_overlap(series, 2) == expected_overlap(series, 2, 60)
    assert expected_overlap(series[:, :1], 1) == 1


def stop(series, stable, bin_steps=1):
    """The step at which a run would stop, and its top layers' overlap with the whole run's."""
    k, planned = stable.top_k, len(series)
    for steps in range(1, planned):
        if stable.due(steps) and steps % bin_steps == 0:
            binned = series[:steps].reshape(steps // bin_steps, bin_steps, -1).sum(axis=1)
            if stable.check(binned, steps, bin_steps=bin_steps, planned=planned):
                break
    today, later = (set(np.argsort(-part.sum(axis=0), kind="stable")[:k]) for part in (series[: steps + 1], series))
    return steps, len(today & later) / len(today | later)


@pytest.mark.parametrize(("make_shares", "least"), [(random_flat, 0.9), (random_settling, 0.9), (random_walk, 0.83)])
def test_a_run_stops_early_with_the_top_layers_of_the_whole_run(make_shares, least):
    steps, overlap = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = stop(conflicts(make_shares(500, 20, rng), 0.3, rng), StableRanking(0.9, top_k=6))
        steps.append(found[0])
        overlap.append(found[1])
    assert 100 < np.mean(steps) < 400
    assert np.mean(overlap) >= least


def test_close_layers_are_profiled_to_the_end():
    series = conflicts(np.full((400, 20), 0.4), 0, np.random.default_rng(0))
    assert stop(series, StableRanking(top_k=6))[0] > 350


def test_bins_of_several_steps_stop_about_when_single_steps_do():
    rng = np.random.default_rng(3)
    series = conflicts(random_settling(1000, 20, rng), 0, rng)
    one, four = (stop(series, StableRanking(top_k=6, next_check=80), width)[0] for width in (1, 4))
    assert abs(one - four) < 0.35 * one


def test_the_rule_looks_ever_more_seldom_and_goes_on_where_it_was():
    series = conflicts(np.full((900, 20), 0.4), 0, np.random.default_rng(0))
    stable = StableRanking(top_k=6)
    looks = []
    for steps in range(1, 900):
        if stable.due(steps):
            looks.append(steps)
            assert not stable.check(series[:steps], steps, planned=5000)
            stable = StableRanking(**asdict(stable))
    assert looks[:3] == [50, 55, 61] and len(looks) < 35
    assert f"{stable.estimate:.2f}" in str(stable) and 0 < stable.estimate < 0.9


def test_a_quarter_of_the_layers_by_default():
    series = conflicts(flat(100, 20), 0, np.random.default_rng(0))
    stable, five = StableRanking(), StableRanking(top_k=5)
    assert stable.check(series, 100) == five.check(series, 100)
    assert stable.estimate == five.estimate == expected_overlap(series, 5, 100)


@pytest.mark.parametrize("bins", [2, 3, 5, 8])
def test_short_series(bins):
    series = conflicts(flat(bins, 4), 0, np.random.default_rng(1))
    low, high = np.round(intervals(series), 9).T
    assert (low >= 0).all() and (low < high).all() and (high <= bins).all()
    assert top_k_share(resample(series, bins), 2).sum() == pytest.approx(2)
    assert block_length(series) <= max(1, bins // 4)


def test_the_same_series_gives_the_same_numbers():
    series = conflicts(flat(90, 9), 0.3, np.random.default_rng(0))
    assert np.array_equal(intervals(series), intervals(series.copy()))
    assert expected_overlap(series, 4) == expected_overlap(series.copy(), 4)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range(k):
    series = np.ones((10, 4), dtype=np.int64)
    for use in (top_k_share, expected_overlap):
        with pytest.raises(UsageError, match=f"k is {k}, but there are 4 shared layers"):
            use(series, k)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (np.ones((1, 4), dtype=np.int64), "1 bins.*profile more steps"),
        (np.ones((10, 0), dtype=np.int64), "Pass non-negative counts"),
        (np.ones(10, dtype=np.int64), "Pass non-negative counts"),
        (np.ones((10, 4)), "float64"),
        (-np.ones((10, 4), dtype=np.int64), "Pass non-negative counts"),
        ([[1, 2], [3, 4]], "list"),
    ],
)
def test_what_is_no_series(series, message):
    for use in (lambda series: resample(series, 10), lambda series: expected_overlap(series, 1)):
        with pytest.raises(UsageError, match=message):
            use(series)


def test_other_arguments_out_of_range():
    series = np.ones((10, 4), dtype=np.int64)
    with pytest.raises(UsageError, match="level is 90"):
        intervals(series, level=90)
    with pytest.raises(UsageError, match="must not be negative"):
        expected_overlap(series, 2, -1)
    with pytest.raises(UsageError, match="4 or more"):
        expected_overlap(series[:3], 2)
    for change in ({"overlap": 0.0}, {"overlap": 1.5}, {"top_k": 0}):
        with pytest.raises(UsageError):
            replace(StableRanking(), **change)


def test_noise_that_all_layers_share_does_not_blur_which_is_above_the_mean():
    shared = np.random.default_rng(0).poisson(20, size=(120, 1))
    series = shared + np.array([[1, 0, 0, 0]])
    low_high = intervals(series, 120 * 60)
    assert low_high[0, 0] < low_high[1, 1]  # by their own intervals, the first could be below the others
    assert above_mean_share(resample(series, 120 * 60)).tolist() == [1, 0, 0, 0]


def test_a_layer_at_the_mean_is_above_it_half_of_the_time():
    rng = np.random.default_rng(0)
    found = [above_mean_share(resample(rng.poisson([12, 6, 9], size=(120, 3)), 120 * 40))[2] for _ in range(40)]
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) >= 0.95) <= 0.15  # about one in twenty
