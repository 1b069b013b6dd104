"""Joint training: the plain sum of the losses, or one with fixed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.task_values import TaskValues, read_values, values_by_task
from recon.methods.bases.weighting import Weighting
from recon.methods.registry import register


@register(
    "joint",
    title="Joint training",
    paper="Caruana, Machine Learning 28, 1997: all tasks at once, every loss weighted equally",
    scale="The sum of the task gradients, each times its weight if weights are given.",
)
class Joint(Weighting):
    """The sum of the losses: what multi-task training does when it does nothing else.

    Args:
        weights: one for each task, which stay as they are: `"0.3/1.7"` in the order of the tasks, or by name
            `"seg:0.3/depth:1.7"`; a sequence or a dict is as good. All are 1 when not given.

    Raises:
        UsageError: a weight is negative or not finite; from `setup`: there is not one for each task.
        UnknownNameError: from `setup`: a weight is for no task of the run.
    """

    works_alone = True

    scale_free = True
    memoryless = True

    def __init__(self, weights: TaskValues | None = None) -> None:
        super().__init__()
        self.static = None if weights is None else read_values(weights, "weights")

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"weights": self.static}

    def _create_state(self) -> None:
        self._static_weights()

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        values = self._stack(losses)
        if self.static is None:
            return values.sum(), dict(zip(losses, torch.ones_like(values.detach()), strict=True))
        positions = self._positions(losses)
        weights = self._static_weights()[positions].to(values)
        return (weights * values).sum(), dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        if self.static is None:
            return torch.ones(count)
        self._positions({})  # there are none before setup
        return self._static_weights()

    def _static_weights(self) -> Tensor:
        if self.static is None:
            return torch.ones(len(self.tasks))
        weights = values_by_task(self.static, self.tasks, "weights")
        missing = [task for task in self.tasks if task not in weights]
        if missing:
            raise UsageError(f"The weights {self.static} lack the tasks {missing}. Give every task one.")
        if not any(weights.values()):
            raise UsageError(f"The weights {self.static} are all 0: nothing would be trained.")
        return torch.tensor([weights[task] for task in self.tasks], dtype=torch.float64)
