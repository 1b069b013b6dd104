"""PairTable: what a conflict map holds, and its counts by task pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from recon.errors import UnknownNameError, UsageError
from recon.maps.counts import Counts, LayerConflicts, threshold_bin
from recon.maps.measures import Floats, rates

_FEW_STEPS = 20  # a rate from fewer is known to 0.1 at best
_FEW_OF_MOST = 10  # one in so many of the most-met pair's steps is few


@dataclass(repr=False)
class PairTable:
    """What was counted in every shared layer, and the counts of any task pairs.

    Args:
        tasks: the tasks whose gradients were compared; empty if an imported file did not name them.
        threshold: the run's own S in (-1, 0]: `conflicts` are counted at it.
        steps: how many training steps were profiled; None if unknown.
        skipped: how many steps were left out because a gradient was not finite; None if unknown.
        stage_steps: the number of steps in each quarter of the training; empty if unknown.
        layers: the shared layers, in model order. An imported map has its file's order; applied to a model, it gets
            the model's.
        made_by: how the map was made (problem, optimizer, seed, versions, seconds...).
        bin_steps: how many steps an entry of the layers' series covers; 0 without series.
        thresholds: at which the layers' `below` and floors are counted, in order; empty without them.
        pair_bin_steps: how many steps an entry of the layers' `pair_series` covers; 0 without them.
        met: (bins, pairs) in how many steps of each bin of `pair_series` a pair met; None without them.
    """

    tasks: tuple[str, ...]
    threshold: float
    steps: int | None
    skipped: int | None
    stage_steps: tuple[int, ...]
    layers: list[LayerConflicts]
    made_by: dict[str, Any] = field(default_factory=dict)
    bin_steps: int = 0
    thresholds: tuple[float, ...] = ()
    pair_bin_steps: int = 0
    met: Counts | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The task pairs, in the order of the `pairs` axis of the counts."""
        return list(combinations(self.tasks, 2))

    def pairs_among(self, tasks: Sequence[str] | None) -> list[int]:
        """The places on the `pairs` axis of the pairs of these tasks; of all when not given.

        Raises:
            UnknownNameError: the map has no such task.
            UsageError: fewer than two tasks, one twice, or the map does not know its tasks.
        """
        if tasks is None:
            return list(range(len(self.pairs)))
        if not self.tasks:
            raise UsageError(
                "This map does not say which tasks it is of: it was imported without their names. Leave the tasks out, "
                "or import it again and name them."
            )
        for task in tasks:
            if task not in self.tasks:
                raise UnknownNameError("task in this map", task, self.tasks)
        if isinstance(tasks, str) or len(tasks) < 2 or len(set(tasks)) < len(tasks):
            raise UsageError(f"The tasks are {tasks!r}. Name two or more different ones of {list(self.tasks)}.")
        return [place for place, pair in enumerate(self.pairs) if set(pair) <= set(tasks)]

    def observed(self) -> dict[str, dict[tuple[str, str], int]]:
        """`{layer name: {(task, task): in how many steps both had a gradient there}}`, pairs as in `pairs`.

        Raises:
            UsageError: the map holds no counts by pair, because it is imported.
        """
        return self._by_pair(self.pair_observations())

    def pair_scores(self, threshold: float | None = None) -> dict[str, dict[tuple[str, str], int]]:
        """`{layer name: {(task, task): in how many steps their cosine was below S}}`, pairs as in `pairs`.

        Args:
            threshold: S, the map's own when not given; one of its `thresholds`, or any of a map of two tasks.

        Raises:
            UsageError: the map holds no counts by pair, or none at this threshold.
        """
        return self._by_pair(self.pair_conflicts(threshold))

    def pair_observations(self) -> Counts:
        """(layers, pairs): `observed` as an array."""
        return np.stack([self._known(layer.observed).sum(axis=0) for layer in self.layers])

    def pair_conflicts(self, threshold: float | None = None) -> Counts:
        """(layers, pairs): `pair_scores` as an array."""
        below = threshold_bin(self.threshold if threshold is None else threshold)
        if below == threshold_bin(self.threshold):
            return np.stack([self._known(layer.conflicts).sum(axis=0) for layer in self.layers])
        if len(self.tasks) == 2 and all(layer.histogram is not None for layer in self.layers):
            return np.array([[layer.histogram[:below].sum()] for layer in self.layers if layer.histogram is not None])
        place = self._kept(below)
        return np.stack([self._known(layer.below)[place] for layer in self.layers])

    def never_met(self, tasks: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """The pairs that were not compared in any layer: nothing is known of their conflicts.

        Of the pairs among `tasks`, all when not given; of a map without counts by pair none, since nobody knows.
        """
        return [pair for pair, steps in self._most_met(tasks).items() if steps == 0]

    def rarely_met(self, tasks: Sequence[str] | None = None) -> dict[tuple[str, str], int]:
        """`{pair: in how many steps it met}`, of the pairs that met so rarely beside others that little is known.

        That is in under a tenth of the steps of the pair of the map that met most, or in under 20 steps and under half
        of its steps. (In a short profile whose pairs all met alike none is rare; intervals say how little it knows.)
        """
        most = max(self._most_met(None).values(), default=0)
        return {
            pair: steps
            for pair, steps in self._most_met(tasks).items()
            if steps > 0 and (_FEW_OF_MOST * steps < most or (steps < _FEW_STEPS and 2 * steps < most))
        }

    @property
    def has_floor(self) -> bool:
        """Whether the map knows how often a task conflicts with itself: the noise floor."""
        return any(layer.floor is not None and layer.floor.observed.any() for layer in self.layers)

    def floor(self, threshold: float | None = None) -> dict[str, dict[str, float]]:
        """`{layer name: {task: share of the floor steps in which it conflicted with itself}}`, where it was measured.

        Args:
            threshold: S, the map's own when not given; one of its `thresholds`.

        Raises:
            UsageError: the map has no floor, or none at this threshold.
        """
        place = self.floor_place(threshold)
        found = ((layer, layer.floor) for layer in self.layers)
        return {
            layer.name: {} if floor is None else _shares(self.tasks, floor.conflicts[place], floor.observed)
            for layer, floor in found
        }

    def across(self, threshold: float | None = None) -> dict[str, dict[tuple[str, str], float]]:
        """`{layer name: {(task, task): share of conflicts between one's gradient and the other's on a second batch}}`.

        What the pair's rate is without the noise that two tasks share on one batch. See `floor`.
        """
        place = self.floor_place(threshold)
        found = ((layer, layer.floor) for layer in self.layers)
        return {
            layer.name: {}
            if floor is None
            else _shares(self.pairs, floor.across_conflicts[place], floor.across_observed)
            for layer, floor in found
        }

    def pair_floors(self, threshold: float | None = None) -> Floats:
        """(layers, pairs): the larger one of the two tasks' own rates of conflict; NaN where one was not measured."""
        place = self.floor_place(threshold)
        i, j = np.triu_indices(len(self.tasks), k=1)
        own = np.full((len(self.layers), len(self.tasks)), np.nan)
        for row, floor in zip(own, (layer.floor for layer in self.layers), strict=True):
            if floor is not None:
                row[:] = np.where(floor.observed > 0, rates(floor.conflicts[place], floor.observed), np.nan)
        return np.asarray(np.maximum(own[:, i], own[:, j]))

    def without_floor(self, tasks: Sequence[str] | None = None) -> dict[str, list[tuple[str, str]]]:
        """`{layer name: the pairs that met there, but have no floor}`: by excess they count as 0; layers with some."""
        chosen = self.pairs_among(tasks)
        unknown = np.isnan(self.pair_floors()) & (self.pair_observations() > 0)
        found = {
            layer.name: [self.pairs[place] for place in chosen if row[place]]
            for layer, row in zip(self.layers, unknown, strict=True)
        }
        return {name: pairs for name, pairs in found.items() if pairs}

    def floor_place(self, threshold: float | None) -> int:
        """The place of a threshold among the map's `thresholds`, of a map with a floor."""
        if not self.has_floor:
            raise UsageError(
                "This map has no noise floor, so nobody knows how much of its conflict is noise. `recon profile` makes "
                "one by default: profile anew, or score by 'count' or 'rate'."
            )
        return self._kept(threshold_bin(self.threshold if threshold is None else threshold))

    def _kept(self, below: int) -> int:
        bins = [threshold_bin(threshold) for threshold in self.thresholds]
        if below not in bins:
            kept = ", ".join(f"{threshold:g}" for threshold in self.thresholds or (self.threshold,))
            raise UsageError(
                f"This map holds counts by task pair at S = {kept}, not at {(below - 100) / 100:g}. Choose one of "
                "them, or profile at the threshold that you want."
            )
        return bins.index(below)

    def _known(self, counts: Counts | None) -> Counts:
        if counts is None:
            raise UsageError(
                "This map holds no counts by task pair, only sums over all of them, because it is imported without "
                "task names or of scores. Score it by 'count' over all its tasks, or profile with recon."
            )
        return counts

    def _by_pair(self, counts: Counts) -> dict[str, dict[tuple[str, str], int]]:
        return {
            layer.name: dict(zip(self.pairs, row, strict=True))
            for layer, row in zip(self.layers, counts.tolist(), strict=True)
        }

    def _most_met(self, tasks: Sequence[str] | None) -> dict[tuple[str, str], int]:
        """In how many steps each pair met, in the layer where it did most often."""
        chosen = self.pairs_among(tasks)
        if any(layer.observed is None for layer in self.layers):
            return {}
        steps = self.pair_observations().max(axis=0).tolist()
        return {self.pairs[place]: steps[place] for place in chosen}


def _shares(names: Sequence[Any], conflicts: Counts, observed: Counts) -> dict[Any, float]:
    found = zip(names, conflicts.tolist(), observed.tolist(), strict=True)
    return {name: count / seen for name, count, seen in found if seen}
