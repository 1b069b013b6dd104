"""ScoreTable: the scores, rankings and intervals that are computed from what a conflict map holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from recon.errors import UsageError
from recon.maps.counts import STAGES, Counts, LayerConflicts, threshold_bin
from recon.maps.measures import By, check_by, mean_excess, mean_rate
from recon.maps.noise.confidence import above_mean_share, interval, top_k_share
from recon.maps.noise.draws import PairDraws, score_draws, series
from recon.maps.pair_table import PairTable
from recon.support.tables import counted


@dataclass(repr=False)
class ScoreTable(PairTable):
    """The scores of every shared layer, by count (Shi et al. 2023, definition 4), by rate or by excess.

    `tasks` of its methods are those whose pairs count, all of the map's when not given; `by` is how layers are
    scored, see `recon.maps.measures.By`. Its fields are those of `recon.maps.pair_table.PairTable`.
    """

    def __repr__(self) -> str:
        steps = "?" if self.steps is None else self.steps
        shared, first = counted(len(self.layers), "shared layer"), ", ".join(self.ranking()[:3])
        return (
            f"{type(self).__name__}({len(self.tasks)} tasks, {shared}, {steps} steps, "
            f"S={self.threshold:g}; first: {first})"
        )

    @property
    def unfinished(self) -> str:
        """The warning for a map of an unfinished profile; empty for a finished one."""
        if self.made_by.get("finished", True):
            return ""
        made = self.made_by
        return (
            f"The profile was interrupted in epoch {made.get('epoch')} of {made.get('epochs')}: its map holds what was "
            "counted until then. Go on with --resume (in Python, resume=True)."
        )

    @overload
    def scores(
        self, threshold: float | None = None, tasks: Sequence[str] | None = None, by: Literal["count"] = "count"
    ) -> dict[str, int]: ...

    @overload
    def scores(
        self, threshold: float | None = None, tasks: Sequence[str] | None = None, by: By = "count"
    ) -> dict[str, float]: ...

    def scores(
        self, threshold: float | None = None, tasks: Sequence[str] | None = None, by: By = "count"
    ) -> Mapping[str, float]:
        """`{layer name: score}`.

        By count, how many (step, pair) had a cosine below S, strictly: a whole number. By rate and by excess, a share
        in [0, 1].

        Args:
            threshold: S, a multiple of 0.01 in (-1, 0]; the map's own when not given. By count over all tasks it may
                be any, else one of the map's `thresholds`.
            tasks: the tasks whose pairs count; all of the map's when not given.
            by: `count`, `rate` or `excess`; the last needs a noise floor.

        Raises:
            UsageError: the map does not hold what this takes; the message says what it holds.
            UnknownNameError: the map has no such task.
        """
        check_by(by)
        chosen = self.pairs_among(tasks)
        below = threshold_bin(self.threshold if threshold is None else threshold)
        if by == "count" and self._is_all(chosen):
            return {layer.name: self._score(layer, below) for layer in self.layers}
        conflicts = self.pair_conflicts(threshold)[:, chosen]
        if by == "count":
            values: NDArray[np.generic] = conflicts.sum(axis=1)
        elif by == "rate":
            values = mean_rate(conflicts, self.pair_observations()[:, chosen])
        else:
            floors = self.pair_floors(threshold)[:, chosen]
            values = mean_excess(conflicts, self.pair_observations()[:, chosen], floors)
        return dict(zip([layer.name for layer in self.layers], values.tolist(), strict=True))

    def ranking(
        self, threshold: float | None = None, tasks: Sequence[str] | None = None, by: By = "count"
    ) -> list[str]:
        """The layer names, highest score first, ties by model order. See `scores`."""
        scores = self.scores(threshold, tasks, by)
        return sorted(scores, key=lambda name: -scores[name])

    def shares(
        self, threshold: float | None = None, tasks: Sequence[str] | None = None, by: By = "count"
    ) -> dict[str, float]:
        """`{layer name: its score as a share}`, in [0, 1]; NaN where that is unknown.

        By count, of all the (step, pair) seen there; by rate and by excess, the score is a share already.
        """
        scores = self.scores(threshold, tasks, by)
        return (
            scores
            if by != "count"
            else {
                name: score / seen if seen else float("nan") if seen is None else 0.0
                for (name, score), seen in zip(scores.items(), self._seen(tasks), strict=True)
            }
        )

    def stage_shares(self, tasks: Sequence[str] | None = None) -> NDArray[np.float64]:
        """(layers, 4): the share of conflicts at the map's own threshold in each quarter; NaN where none was seen."""
        chosen = self.pairs_among(tasks)
        conflicts, observed = (
            np.array(
                [np.zeros(STAGES) if counts is None else counts[:, chosen].sum(axis=1) for counts in column],
                dtype=float,
            )
            for column in ([layer.conflicts for layer in self.layers], [layer.observed for layer in self.layers])
        )
        return np.divide(conflicts, observed, out=np.full_like(conflicts, np.nan), where=observed > 0)

    @property
    def has_series(self) -> bool:
        """Whether the map knows the scores over time, in enough bins to say how sure they are."""
        return all(layer.series is not None and len(layer.series) > 1 for layer in self.layers)

    @property
    def has_pair_series(self) -> bool:
        """Whether it knows them by task pair, as scores of some tasks, by rate and by excess take it."""
        return self.met is not None and len(self.met) > 1

    def series(self) -> Counts:
        """(B, layers): cosines below the map's own threshold by bin of `bin_steps` consecutive steps.

        Raises:
            UsageError: the map does not hold them, because it is imported, merged or of one bin.
        """
        return series(self)

    def intervals(
        self, level: float = 0.9, tasks: Sequence[str] | None = None, by: By = "count"
    ) -> dict[str, tuple[float, float]]:
        """`{layer name: (low, high)}`: what holds a share `level` of resampled scores at the map's own threshold.

        From a block bootstrap over the steps, see `recon.maps.noise.confidence`: it shows what other batches would have
        done to this training, not what another seed would. An interval reaches to the score itself; by count it ends at
        whole numbers.

        Raises:
            UsageError: the map holds no scores over time, none by pair where that takes them, or no floor.
        """
        low, high = interval(score_draws(self, tasks, by), level).T
        scores = self.scores(tasks=tasks, by=by)
        values = np.array(list(scores.values()))
        low, high = np.minimum(low, values), np.maximum(high, values)
        if by == "count":
            low, high = np.floor(low).astype(int), np.ceil(high).astype(int)
        return dict(zip(scores, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def top_k_probability(self, k: int, tasks: Sequence[str] | None = None, by: By = "count") -> dict[str, float]:
        """`{layer name: how often it is among the k highest resampled scores}`; they add up to k. See `intervals`."""
        return self._by_name(top_k_share(score_draws(self, tasks, by), k))

    def above_mean_probability(self, tasks: Sequence[str] | None = None, by: By = "count") -> dict[str, float]:
        """`{layer name: how often its resampled score is above the mean of all layers' in the same draw}`."""
        return self._by_name(above_mean_share(score_draws(self, tasks, by)))

    def above_floor_probability(self, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """`{layer name: how likely its tasks conflict there more than by noise}`; NaN where no pair has a floor.

        The posterior probability that the pairs' rates of conflict lie above their floors in sum, or that of the pair
        for which it is surest, with Bonferroni's correction for asking of so many. See `intervals`.

        Raises:
            UsageError: the map holds no noise floor, or no counts by pair over time.
        """
        return self._by_name(PairDraws(self, self.pairs_among(tasks)).above_floor())

    def _by_name(self, values: Iterable[float]) -> dict[str, float]:
        return {layer.name: float(value) for layer, value in zip(self.layers, values, strict=True)}

    def _is_all(self, chosen: Sequence[int]) -> bool:
        return len(chosen) == len(self.pairs)

    def _seen(self, tasks: Sequence[str] | None) -> list[int | None]:
        """How many (step, pair) each layer saw; None where that is unknown."""
        chosen = self.pairs_among(tasks)
        if not self._is_all(chosen):
            seen: list[int | None] = self.pair_observations()[:, chosen].sum(axis=1).tolist()
            return seen
        return [None if layer.histogram is None else int(layer.histogram.sum()) for layer in self.layers]

    def _score(self, layer: LayerConflicts, below: int) -> int:
        if layer.histogram is not None:
            return int(layer.histogram[:below].sum())
        if below != threshold_bin(self.threshold) or layer.score is None:
            raise UsageError(
                f"This map holds only its scores at S={self.threshold:g}, not the cosines to score it at another "
                "threshold. Leave the threshold out, or make a map with recon, which can be scored at any."
            )
        return layer.score


Table = TypeVar("Table", bound=ScoreTable)
