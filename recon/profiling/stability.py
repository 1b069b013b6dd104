"""When profiling can stop: once a longer run is expected to rank the layers alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recon.errors import UsageError
from recon.maps.noise.confidence import Series, expected_overlap


@dataclass
class StableRanking:
    """Stops a profiling run once its top layers are expected to be those of the whole run.

    Looks after `next_check` steps, then whenever a tenth more have been profiled: a look costs milliseconds, and
    fewer looks leave fewer chances to stop by luck. `StableRanking(**dataclasses.asdict(stable))` goes on where
    `stable` was.
    """

    overlap: float = 0.9  # stop when `expected_overlap` is at least this, in (0, 1]
    top_k: int | None = None  # a quarter of the shared layers when not given
    next_check: int = 50  # profiled steps before the next look
    estimate: float = math.nan  # the overlap expected at the last look; NaN before the first

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise UsageError(f"The overlap to wait for is {self.overlap}. Give a share in (0, 1], such as 0.9.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}. Give at least 1 layer.")

    def __str__(self) -> str:
        top = "The top quarter of the layers" if self.top_k is None else f"The top {self.top_k} layers"
        return f"{top}: expected overlap {self.estimate:.2f} with a longer run's; {self.overlap:g} is enough."

    def due(self, steps: int) -> bool:
        """Whether it is time to look, after so many profiled steps."""
        return steps >= self.next_check

    def check(self, series: Series, steps: int, *, bin_steps: int = 1, planned: int | None = None) -> bool:
        """Whether the top layers are settled; sets the next look.

        `series` holds the (B, L) conflicts so far, in bins of `bin_steps` steps. The whole run has `planned` steps;
        twice as many as so far when not given.
        """
        k = max(1, series.shape[1] // 4) if self.top_k is None else self.top_k
        to_come = steps if planned is None else max(0, planned - steps)
        self.estimate = expected_overlap(series, k, future=to_come / bin_steps)
        self.next_check = steps + math.ceil(steps / 10)
        return self.estimate >= self.overlap
