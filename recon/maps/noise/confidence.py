"""How sure a ranking is: a block bootstrap over the steps of training."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from recon.errors import UsageError

Series = NDArray[np.int64]
"""(B, L) conflicts in each of B bins of consecutive steps, in each of L layers in model order."""
Floats = NDArray[np.float64]

_STAGES = 4  # quarters of the training, as in a conflict map
_LEAST_BLOCKS = 4  # in a stage: a variance from fewer is worth little
_SEED = 0  # the same map always gives the same numbers


def block_length(series: Series | Floats) -> int:
    """Length of the resampled blocks, in bins: the one that estimates the variance of a mean with least error.

    The optimum for circular blocks, (2 G^2 / D B)^(1/3) with G = sum |h| R(h) and D = 4/3 (sum R(h))^2 over the
    autocovariances R (Politis and White, "Automatic block-length selection for the dependent bootstrap", Econometric
    Reviews 2004), of an AR(1) process: (sqrt(6) rho / (1 - rho^2))^(2/3) B^(1/3). Carlstein (Annals of Statistics
    1986), whose blocks do not overlap, has 2 in place of sqrt(6). One rho for all layers, from their series without
    linear trends. At least B^(1/3), for dependence that an AR(1) does not describe, and at most a quarter of B.
    """
    bins = len(series)
    time = np.arange(bins) - (bins - 1) / 2
    centred = series - series.mean(axis=0)
    noise = centred - np.outer(time, time @ centred / (time @ time))
    power = (noise**2).sum()
    rho = min(max(0.0, (noise[1:] * noise[:-1]).sum() / power), 0.99) if power > 0 else 0.0
    factor = max(1.0, (math.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3))
    return min(math.ceil(factor * bins ** (1 / 3)), max(1, bins // 4))


def resample(series: Series, trials: NDArray[np.int64] | int, draws: int = 1000) -> Floats:
    """Expected scores that fit what was seen: (draws, L), by a block bootstrap of the steps.

    Neighbouring steps are dependent, so that blocks of them are drawn (Künsch, Annals of Statistics 1989), wrapped
    around at the ends for every step to weigh the same (Politis and Romano 1992). All layers get the same blocks:
    their noise is shared, and ranks hang on differences. Blocks stay within their quarter of the training: what
    changes from one to the next is drift, not noise. The same series always gives the same draws. They show what other
    batches would have done to this training, not what another seed would.

    `trials` are the (step, pair) observed, of each layer or all alike. They say how much a layer is known of in which
    all or none of them conflicted, and which no bootstrap can vary: see `share_draws`.
    """
    _check(series)
    observed: Floats = np.broadcast_to(trials, series.shape[1:]).astype(np.float64)
    shares = series.sum(axis=0) / np.maximum(observed, 1)
    moved = deviations(series, draws) / np.maximum(observed, 1)
    dependent = float(observed.max() / len(series))  # all that a bin holds may be one and the same event
    effect = design_effect(shares, moved.var(axis=0), observed, dependent)
    return share_draws(shares, moved, observed, effect, np.random.default_rng(_SEED + 2)) * observed


def share_draws(shares: Floats, moved: Floats, trials: Floats, effect: float, random: np.random.Generator) -> Floats:
    """Rates of conflict that fit what was seen: (draws, ...) from the shares (...) seen in so many trials.

    A bootstrap alone sees no noise where all or none of the trials conflicted, however few they were. So a conflict and
    a trial without one are added, each with a weight of Gamma(1/2): in the Bayesian bootstrap (Rubin, Annals of
    Statistics 1981), which weighs each of n independent trials by Gamma(1), the rate of c conflicts then follows
    Beta(c + 1/2, n - c + 1/2), the posterior under Jeffreys' prior. Where trials depend on each other, over time and
    between the pairs of a step, n of them are worth n / `effect` independent ones (Kish, Survey Sampling 1965).

    Args:
        shares: what share of the trials conflicted.
        moved: (draws, ...) what the bootstrap adds to the shares.
        trials: how many there were; where there were none, the rate is 0.
        effect: see `design_effect`.
        random: where the weights come from.
    """
    more, less = random.standard_normal((2, *moved.shape)) ** 2 / 2  # Gamma(1/2)
    seen = random.standard_gamma(np.broadcast_to(trials / effect, moved.shape))
    drawn = (seen * np.clip(shares + moved, 0, 1) + more) / (seen + more + less)
    return np.where(trials > 0, drawn, 0.0)


def design_effect(shares: Floats, variances: Floats, trials: Floats, most: float) -> float:
    """How many dependent trials are worth one independent one, at least 1, for all shares alike.

    The variances that the bootstrap sees, over those of independent trials; `most` where there is neither.
    """
    independent = float((shares * (1 - shares) / np.maximum(trials, 1)).sum())
    return max(1.0, float(variances.sum()) / independent if independent > 0 else most)


def deviations(series: Series | Floats, draws: int, length: int | None = None) -> Floats:
    """(draws, L): what blocks of this length, drawn within each stage, add to the sums of (B, L); of mean zero.

    Series of as many bins get the same blocks, if they are given the same length.
    """
    bins, layers = series.shape
    length = block_length(series) if length is None else length
    stages = min(_STAGES, max(1, bins // (_LEAST_BLOCKS * length)))
    random = np.random.default_rng(_SEED)
    total = np.zeros((draws, layers))
    for stage in np.array_split(series, stages):
        size = len(stage)
        sums = np.cumsum(np.concatenate([np.zeros((1, layers)), stage, stage[: length - 1]]), axis=0)
        blocks = sums[length:] - sums[:-length]
        count = math.ceil(size / length)
        drawn = random.integers(size, size=(draws, count)) + size * np.arange(draws)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=draws * size).reshape(draws, size)
        # The variance of blocks about their own mean is small by 1 - length / size, and count * length is not size.
        scale = math.sqrt(size / (count * length * (1 - length / size)))
        total += scale * (times_drawn @ (blocks - blocks.mean(axis=0)))
    return total


def interval(draws: Floats, level: float) -> Floats:
    """(L, 2): what holds a share `level` of (draws, L)."""
    if not 0 < level < 1:
        raise UsageError(f"level is {level}. Choose a share between 0 and 1, such as 0.9.")
    tail = (1 - level) / 2
    return np.asarray(np.quantile(draws, [tail, 1 - tail], axis=0).T)


def top_k_share(draws: Floats, k: int) -> Floats:
    """(L,): in what share of (draws, L) each layer is among the k highest. They add up to k.

    Layers that tie at the cut share its places. (`ConflictMap.ranking` breaks ties by model order, about which the data
    say nothing.)
    """
    _check_k(k, draws.shape[1])
    cut = -np.partition(-draws, k - 1, axis=1)[:, [k - 1]]
    above, tied = draws > cut, draws == cut
    places = k - above.sum(axis=1, keepdims=True)
    return np.asarray((above + tied * places / tied.sum(axis=1, keepdims=True)).mean(axis=0))


def above_mean_share(draws: Floats) -> Floats:
    """(L,): in what share of (draws, L) each layer is above the mean of all layers in the same draw.

    Noise that the layers share cancels, as it does not in an interval.
    """
    return np.asarray((draws > draws.mean(axis=1, keepdims=True)).mean(axis=0))


def expected_overlap(series: Series, k: int, future: float | None = None, draws: int = 500) -> float:
    """The expected Jaccard overlap, |A and B| / |A or B|, of today's top k layers with those of a longer run.

    The longer run's scores are today's and those of `future` more bins (as many as were seen when not given), drawn
    from what the later half of the series foretells, since conflicts drift and later steps say more of what comes:

    - noise: with h the future's length in halves, a sum of h halves differs from h times the one half seen by
      sqrt(h + h^2) times the deviation of one: the h of its own and the h^2 of a rate that is not known exactly.
    - drift: the rates' next change is normal, with the covariance that the one change seen, from the first half to
      the second, estimates: it is a standard normal multiple of that change, the same in all layers.
    - rare conflicts: half a conflict more than was seen, as Jeffreys' prior for a rate has it. None seen does not mean
      none to come, and layers that tie are not settled by their order in the model.
    """
    _check(series, k, least=4)
    bins, layers = series.shape
    future = bins if future is None else future
    if future < 0:
        raise UsageError(f"future is {future} bins. It must not be negative.")
    if future == 0:
        return 1.0
    first, second = series[: bins // 2], series[bins // 2 :]
    halves = future / len(second)
    noise = math.sqrt(halves + halves**2) * deviations(second, draws)
    random = np.random.default_rng(_SEED + 1)
    drift = random.standard_normal((draws, 1)) * (second.mean(axis=0) - first.mean(axis=0)) * future
    rare = halves * random.standard_gamma(0.5, (draws, layers))
    more = np.clip(halves * second.sum(axis=0) + noise + drift, 0, None) + rare
    scores = series.sum(axis=0)
    today = np.zeros(layers, dtype=bool)
    today[np.argsort(-scores, kind="stable")[:k]] = True
    common = today[np.argsort(-(scores + more), axis=1)[:, :k]].sum(axis=1)
    return float((common / (2 * k - common)).mean())


def _check(series: Series, k: int = 1, least: int = 2) -> None:
    counts = isinstance(series, np.ndarray) and series.ndim == 2 and series.dtype.kind in "iu" and (series >= 0).all()
    if not counts or series.shape[1] == 0:
        kind = f"{series.dtype} of shape {series.shape}" if isinstance(series, np.ndarray) else type(series).__name__
        raise UsageError(f"series is {kind}. Pass non-negative counts of shape (bins of steps, layers).")
    if len(series) < least:
        raise UsageError(
            f"The series has {len(series)} bins of steps, but noise shows in {least} or more: profile more steps."
        )
    _check_k(k, series.shape[1])


def _check_k(k: int, layers: int) -> None:
    if not 1 <= k <= layers:
        raise UsageError(f"k is {k}, but there are {layers} shared layers. Choose between 1 and {layers}.")
