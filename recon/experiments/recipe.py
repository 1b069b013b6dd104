"""Recipe: optimizer, schedule, clipping, accumulation and precision of a training. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from recon.errors import UsageError

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "one-cycle")


@dataclass(frozen=True)
class Recipe:
    """How a training goes; a setting that is None is the problem's own.

    Args:
        optimizer: one of `OPTIMIZERS`.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: one of `SCHEDULES`.
        milestones: epochs after which the schedule `step` multiplies the learning rate by `gamma`.
        gamma: see there.
        warm_up: how long the learning rate rises at first: a number of steps, or below 1 a part of all steps.
        clip: the largest norm of an update.
        accumulate: batches for one step; or `tasks`, as many as it takes to see each task.
        amp: precision of the forward; the model's own if None.
    """

    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    milestones: tuple[int, ...] = ()
    gamma: float | None = None
    warm_up: int | float | None = None
    clip: float | None = None
    accumulate: int | Literal["tasks"] = 1
    amp: Literal["bf16", "fp16"] | None = None

    def settings(self) -> dict[str, Any]:
        """The settings as a training's record keeps them: plain values, by the options of `recon train`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["milestones"] = list(self.milestones)
        return {f"--{name.replace('_', '-')}": value for name, value in values.items()}

    def check(self, epochs: int) -> None:
        """Check that the settings fit together, in a training of so many epochs.

        Raises:
            UsageError: they do not.
        """
        steps = self.schedule == "step"
        if (self.milestones or self.gamma is not None) and not steps:
            raise UsageError(
                "milestones and gamma belong to the schedule step. Choose that schedule, or leave them out."
            )
        if steps and not self.milestones:
            raise UsageError("The schedule step needs milestones, the epochs after which it steps, such as 10 and 15.")
        if any(later <= earlier for earlier, later in pairwise([0, *self.milestones, epochs])):
            listed = " ".join(map(str, self.milestones))
            raise UsageError(
                f"The milestones are {listed}. They must increase, from above 0 to below the {epochs} epochs."
            )
        if self.momentum is not None and self.optimizer in ("adam", "adamw"):
            raise UsageError(f"momentum is a setting of sgd, not of {self.optimizer}. Choose sgd, or leave it out.")
