"""When a training is evaluated, and which epoch was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from recon.errors import UnknownNameError

Record = Mapping[str, Any]
"""An epoch of a run's history: the fields of `recon.Epoch`."""

Directions = Mapping[str, Mapping[str, bool]]
"""`{task: {metric: higher is better}}`."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a training.

    `best_by`, `task.metric`, decides the best epoch. When not given, it is the mean over tasks, and over the metrics of
    each, of the relative improvement on the training's first evaluation.
    """

    every: int = 1  # evaluate after each n-th epoch, and after the last
    best_by: str | None = None
    keep_best: bool = True  # whether the best epoch's model is kept beside the last one

    def check(self, directions: Directions) -> None:
        """Check that the metric of `best_by` exists."""
        known = [f"{task}.{metric}" for task, metrics in directions.items() for metric in metrics]
        if self.best_by is not None and self.best_by not in known:
            raise UnknownNameError("metric", self.best_by, known, "Write it as TASK.METRIC.")

    def due(self, number: int, epochs: int) -> bool:
        """Whether the model is evaluated after this epoch."""
        return number % self.every == 0 or number == epochs

    def best(self, history: Sequence[Record], directions: Directions) -> Record | None:
        """The best of the epochs that were evaluated, the first of equal ones; None if none was."""
        evaluated = [record for record in history if record.get("results")]
        if not evaluated:
            return None
        first = evaluated[0]["results"]
        return max(evaluated, key=lambda record: self._score(record["results"], first, directions))

    def _score(self, results: Record, first: Record, directions: Directions) -> float:
        if self.best_by is None:
            score = fmean(
                fmean(_improvement(value, first[task][name], directions[task][name]) for name, value in metrics.items())
                for task, metrics in results.items()
            )
        else:
            task, _, metric = self.best_by.partition(".")
            score = _improvement(results[task][metric], 0.0, directions[task][metric])
        return score if math.isfinite(score) else -math.inf


def _improvement(value: float | None, first: float | None, higher_is_better: bool) -> float:
    """The relative change, or the change itself where the first value is 0."""
    if value is None or first is None:  # JSON's word for a number that is not finite
        return math.nan
    change = value - first if higher_is_better else first - value
    return change / abs(first) if first else change
