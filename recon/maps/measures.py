"""The ways to score a layer by its task pairs: their conflicts, their rate of conflict, its excess over the noise."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recon.errors import UsageError

By = Literal["count", "rate", "excess"]
"""How layers are scored by the conflicts of task pairs.

- `count`: how many (step, pair) conflicted, the S-conflict score (Shi et al. 2023, definition 4).
- `rate`: the share of the steps in which a pair met that it conflicted in; the mean over the pairs. A pair that never
  met counts as 0. Where all pairs met equally often, it ranks as `count` does.
- `excess`: how far a pair's rate lies above its noise floor, at least 0; the mean over the pairs. The floor is the
  larger one of its two tasks' rates of conflict with themselves on two batches at the same weights. A pair that never
  met or has no floor counts as 0.
"""

Floats = NDArray[np.float64]


def check_by(by: str) -> None:
    """Refuse what is no way to score."""
    if by not in get_args(By):
        raise UsageError(f"by is {by!r}. Choose {', '.join(map(repr, get_args(By)))}.")


def rates(conflicts: NDArray[Any], observed: NDArray[Any]) -> Floats:
    """Conflicts as a share of what was observed; 0 where nothing was."""
    return np.asarray(conflicts / np.maximum(observed, 1), dtype=float)


def mean_rate(conflicts: NDArray[Any], observed: NDArray[Any]) -> Floats:
    """(..., L) scores by rate of (..., L, pairs) counts."""
    return np.asarray(rates(conflicts, observed).mean(axis=-1), dtype=float)


def mean_excess(conflicts: NDArray[Any], observed: NDArray[Any], floor: Floats) -> Floats:
    """(..., L) scores by excess of (..., L, pairs) counts, and floors that are NaN where unknown."""
    above = np.clip(rates(conflicts, observed) - floor, 0, None)
    return np.asarray(np.nan_to_num(above, nan=0.0).mean(axis=-1), dtype=float)
