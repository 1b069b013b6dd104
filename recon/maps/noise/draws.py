"""Scores of a conflict map that the same training could have had, by count, rate or excess, over any tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from recon.errors import UsageError
from recon.maps.counts import Counts
from recon.maps.measures import By, Floats, check_by, rates
from recon.maps.noise.confidence import block_length, design_effect, deviations, resample, share_draws
from recon.maps.pair_table import PairTable

_DRAWS, _LEAST_DRAWS = 1000, 200
_MOST_NUMBERS = 2**23  # to draw for all pairs of all layers: a second
_SEED = 7

_NOTHING_OVER_TIME = (
    "This map holds no {what} over time, so nothing shows how sure its scores are: imported and merged maps hold none, "
    "nor do those of older files{tasks} or of a single step. Profile with recon, for two steps or more."
)


def series(table: PairTable) -> Counts:
    """(B, layers): cosines below the map's own threshold by bin of `bin_steps` consecutive steps."""
    found = [layer.series for layer in table.layers if layer.series is not None and len(layer.series) > 1]
    if len(found) < len(table.layers):
        raise UsageError(_NOTHING_OVER_TIME.format(what="scores", tasks=""))
    return np.stack(found, axis=1)


def score_draws(table: PairTable, tasks: Sequence[str] | None, by: By) -> Floats:
    """(draws, layers): scores at the map's own threshold, see `recon.maps.noise.confidence.resample`.

    Raises:
        UsageError: the map holds no series for it.
    """
    check_by(by)
    chosen = table.pairs_among(tasks)
    if by == "count" and len(chosen) == len(table.pairs):
        over_time = series(table)
        return resample(over_time, _seen(table, over_time), _DRAWS)
    pairs = PairDraws(table, chosen)
    if by == "count":
        return resample(pairs.series.sum(axis=2), pairs.observed.sum(axis=1), _DRAWS)
    return pairs.mean_rates() if by == "rate" else pairs.mean_excesses()


def _seen(table: PairTable, over_time: Counts) -> Counts:
    """(layers,) the cosines seen; where that is not known, as many as the fullest bin allows."""
    fullest = over_time.max(axis=0) * len(over_time)
    known = [None if layer.histogram is None else int(layer.histogram.sum()) for layer in table.layers]
    return np.array([most if seen is None else seen for seen, most in zip(known, fullest.tolist(), strict=True)])


class PairDraws:
    """Rates of conflict of some pairs that fit what was seen of them.

    Args:
        table: the map.
        chosen: the places of the pairs.
    """

    def __init__(self, table: PairTable, chosen: Sequence[int]) -> None:
        if table.met is None or len(table.met) < 2:
            raise UsageError(_NOTHING_OVER_TIME.format(what="counts by task pair", tasks=", of chosen tasks,"))
        found = [layer.pair_series for layer in table.layers if layer.pair_series is not None]
        self.table = table
        self.chosen = list(chosen)
        self.series = np.stack(found, axis=1)[:, :, self.chosen]  # (bins, layers, pairs)
        self.observed = table.pair_observations()[:, self.chosen]  # (layers, pairs)
        self.rates = rates(self.series.sum(axis=0), self.observed)
        met = table.met[:, self.chosen]
        # How often each bin saw a pair in a layer: as often as it met, in the layer's share of all.
        seen = met[:, None] * rates(self.observed, met.sum(axis=0))
        self.residuals = rates(self.series - seen * self.rates, self.observed)
        self.draws = min(_DRAWS, max(_LEAST_DRAWS, _MOST_NUMBERS // max(1, self.observed.size)))
        length = block_length(self.residuals.mean(axis=2))
        # They are linear in the series: those of the identity give those of any.
        self._deviations = deviations(np.eye(len(met)), self.draws, length)

    def mean_rates(self) -> Floats:
        """(draws, layers): the mean over the pairs; one that never met has rate 0."""
        met = self.observed > 0
        share_met = met.mean(axis=1)
        scale = np.where(share_met > 0, share_met, 1.0)
        # Of a mean of rates, Kish's effective number of trials.
        trials = met.sum(axis=1) ** 2 / np.where(share_met > 0, (met / np.maximum(self.observed, 1)).sum(axis=1), 1.0)
        shares = self.rates.mean(axis=1) / scale
        moved = self._deviations @ self.residuals.mean(axis=2) / scale
        effect = design_effect(shares, moved.var(axis=0), trials, most=len(self.chosen))
        return share_draws(shares, moved, trials, effect, np.random.default_rng(_SEED)) * share_met

    def mean_excesses(self) -> Floats:
        """(draws, layers): the mean over the pairs of what is above the floor; of one that has none, 0."""
        found = [np.nan_to_num(excess.clip(0, None), nan=0.0).mean(axis=1) for excess in self.excesses()]
        return np.stack(found, axis=1)

    def above_floor(self) -> list[float]:
        """How likely each layer conflicts beyond its noise, see `ScoreTable.above_floor_probability`."""
        return [_above_zero(excess[:, ~np.isnan(excess).any(axis=0)]) for excess in self.excesses()]

    def excesses(self) -> Iterator[Floats]:
        """Of each layer, (draws, pairs): rate less floor; NaN of a pair that never met or has no floor.

        A floor of c conflicts in n steps is drawn from Beta(c + 1/2, n - c + 1/2), Jeffreys' posterior: floor steps are
        far apart, so that they count as independent.
        """
        place = self.table.floor_place(None)
        trials = self.observed.astype(float)
        variances = np.stack([self._moved(number).var(axis=0) for number in range(len(trials))])
        effect = design_effect(self.rates, variances, trials, most=1.0)
        i, j = (of[self.chosen] for of in np.triu_indices(len(self.table.tasks), k=1))
        for number, floor in enumerate(layer.floor for layer in self.table.layers):
            random = np.random.default_rng([_SEED, number])
            drawn = share_draws(self.rates[number], self._moved(number), trials[number], effect, random)
            drawn[:, self.observed[number] == 0] = np.nan
            if floor is None:
                yield np.full_like(drawn, np.nan)
                continue
            conflicts, observed = floor.conflicts[place], floor.observed
            own = random.beta(conflicts + 0.5, observed - conflicts + 0.5, (self.draws, len(observed)))
            own[:, observed == 0] = np.nan
            yield drawn - np.maximum(own[:, i], own[:, j])

    def _moved(self, number: int) -> Floats:
        return np.asarray(self._deviations @ np.ascontiguousarray(self.residuals[:, number]))


def _above_zero(excess: Floats) -> float:
    """How likely the pairs' (draws, pairs) excesses are above 0 together, or the surest of them by itself.

    Two such questions are asked, the second one of each pair; Bonferroni's correction allows for that.
    """
    draws, pairs = excess.shape
    if pairs == 0:
        return float("nan")
    together = float((excess.sum(axis=1) <= 0).mean())
    if pairs == 1:
        return 1 - together
    surest = (float((excess <= 0).sum(axis=0).min()) + 0.5) / draws  # so many draws resolve no less
    return max(0.0, 1 - 2 * min(together, pairs * surest))
