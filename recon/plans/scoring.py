"""Scoring: what a plan ranks layers by, over the pairs of the tasks that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.branching import Partition
from recon.errors import UsageError
from recon.maps import ConflictMap
from recon.maps.measures import By, rates

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Scoring:
    """The scores of a map's layers, over the pairs of some tasks.

    Where the map does not know these tasks, or holds no counts by pair, all its pairs count: the conflicts of other
    tasks are the best guess that there is.

    Args:
        cmap: the map.
        tasks: those of the plan.
        threshold: S; the map's own when not given.
        by: how layers are scored, see `recon.maps.measures.By`.
    """

    cmap: ConflictMap
    tasks: tuple[str, ...]
    threshold: float | None = None
    by: By = "count"

    @property
    def unknown(self) -> list[str]:
        """The tasks of the plan that the map does not know."""
        return [task for task in self.tasks if task not in self.cmap.tasks]

    @property
    def knows_pairs(self) -> bool:
        """Whether the map holds the counts of the pairs of these tasks."""
        return not self.unknown and all(layer.conflicts is not None for layer in self.cmap.layers)

    @property
    def among(self) -> tuple[str, ...] | None:
        """The tasks whose pairs count, as `ConflictMap.scores` takes them; None for all of the map's."""
        return self.tasks if self.knows_pairs and set(self.tasks) != set(self.cmap.tasks) else None

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """`{layer: score}`, in the map's order."""
        return self.cmap.scores(self.threshold, self.among, self.by)

    @cached_property
    def ranking(self) -> list[str]:
        """The layers, highest score first, ties in the map's order."""
        return sorted(self.scores, key=lambda name: -self.scores[name])

    @property
    def of_nothing(self) -> bool:
        """Whether no layer has a score above 0."""
        return not any(self.scores.values())

    def parted(self, split: Mapping[str, Partition]) -> dict[str, float]:
        """`{layer: what branching it would part}`: its score without the pairs whose tasks stay in one group.

        Counts by pair are known at some thresholds; at another one, a score is parted in the proportion of the map's
        own. Where the map does not know the pairs of these tasks, nothing is left out.
        """
        if not self.knows_pairs:
            return dict(self.scores)
        shares = [
            1.0 if len(split[name].groups) == len(self.tasks) else _share_between(split[name], self._pairs, values)
            for name, values in zip(self.scores, self._pair_values, strict=True)
        ]
        parts = {name: score * share for (name, score), share in zip(self.scores.items(), shares, strict=True)}
        return {name: round(part) for name, part in parts.items()} if self.by == "count" else parts

    @cached_property
    def never_met(self) -> Pairs:
        """The pairs of the plan's tasks that no step of the profile compared; none where nobody knows."""
        return self.cmap.never_met(self.tasks) if self.knows_pairs else []

    @property
    def compares_nothing(self) -> bool:
        """Whether no pair of the plan's tasks was ever compared."""
        return self.knows_pairs and len(self.never_met) == len(self._pairs)

    @cached_property
    def _pairs(self) -> Pairs:
        """The pairs that count."""
        return [self.cmap.pairs[place] for place in self.cmap.pairs_among(self.among)]

    @cached_property
    def _pair_values(self) -> NDArray[Any]:
        """(layers, pairs) of `_pairs`: what each adds to its layer's score, but for a common factor."""
        try:
            conflicts, threshold = self.cmap.pair_conflicts(self.threshold), self.threshold
        except UsageError:  # not kept at this threshold
            conflicts, threshold = self.cmap.pair_conflicts(), None
        values = conflicts if self.by == "count" else rates(conflicts, self.cmap.pair_observations())
        if self.by == "excess":
            values = np.nan_to_num(np.clip(values - self.cmap.pair_floors(threshold), 0, None))
        return np.asarray(values[:, self.cmap.pairs_among(self.among)])


def named(pairs: Iterable[tuple[str, str]], limit: int = 6) -> str:
    """The first pairs, for a message: `a-b, a-c, ...`."""
    names = ["-".join(pair) for pair in pairs]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _share_between(partition: Partition, pairs: Sequence[tuple[str, str]], values: NDArray[Any]) -> float:
    """What lies between the groups, as a share of all; 0 of nothing."""
    label = partition.label_of
    between = [label[a] != label[b] for a, b in pairs]
    return float(values[between].sum() / (values.sum() or 1))
