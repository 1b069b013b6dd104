"""Methods that weigh the losses: plain sum, uncertainty weighting, dynamic weight average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import scalarization

from recon.errors import UsageError
from recon.methods.bases.learned_scales import LearnedScales
from recon.methods.bases.task_values import TaskValues, read_values, values_by_task
from recon.methods.bases.weighting import Weighting
from recon.methods.registry import register

_HIGHEST_RATE = 10.0  # of DWA


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


@register(
    "uw",
    title="Uncertainty weighting",
    paper="Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115, eq. (7) with s = log σ²",
    scale="Starts as the sum of the task gradients, then multiplies each by its learned exp(-s).",
)
class UW(LearnedScales):
    """Weighs every loss by a learned uncertainty: the sum of `exp(-s) L + s`.

    The log-variances s start at 0 and are parameters, made by `setup`, for the caller's optimizer to train
    along with the model, without weight decay. The log-variance of an absent task gets no gradient.
    """

    factor = 2.0  # TorchJD keeps the paper's factor 1/2, which would start at half the sum of the losses.

    def _scalarizer(self) -> nn.Module:
        return scalarization.UW(())

    def _weight(self, s: Tensor) -> Tensor:
        return torch.exp(-s)


# TorchJD has a DWA too, but its history is a Python list that a state_dict leaves out, and it counts the
# steps of all tasks together, so that a task's average would include the steps where it was absent.
@register(
    "dwa",
    title="Dynamic weight average",
    paper="Liu, Johns, Davison, CVPR 2019, arXiv 1803.10704, eq. (7)",
    scale="The weights of all tasks add up to T; they are 1 during the first two epochs.",
)
class DWA(Weighting):
    """Weighs a loss the more, the slower it fell between the last two epochs.

    `w_k = T exp(r_k / temperature) / Σ_i exp(r_i / temperature)`, where r_k is the ratio of task k's average
    losses over the last two epochs in which it took part; an average counts the steps where it did. A task
    with fewer than two such epochs, or one of whose averages is not above zero, counts as unchanged: r_k = 1. No ratio
    counts as more than 10: a loss that rises from next to nothing would leave the others no weight.

    Args:
        temperature: the larger, the more even the weights. The paper uses 2.

    Raises:
        UsageError: the temperature is not a positive number.
    """

    loss_sum: Tensor
    steps: Tensor
    averages: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UsageError(f"DWA's temperature must be positive and finite, but got {temperature}.")
        self.temperature = temperature

    def _create_state(self) -> None:
        count = len(self.tasks)
        self.register_buffer("loss_sum", torch.zeros(count))
        self.register_buffer("steps", torch.zeros(count))
        self.register_buffer("averages", torch.full((2, count), math.nan))

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        positions = self._positions(losses)
        values = self._stack(losses)
        # What is not finite would never leave the sum, though a GradScaler skips the step.
        finite = values.detach().isfinite()
        self.loss_sum[positions] += values.detach().where(finite, 0.0).to(self.loss_sum)
        self.steps[positions] += finite.to(self.steps)
        weights = self.weights(len(self.tasks))[positions].to(values)
        return (weights * values).sum(), dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        if not self.tasks:
            return torch.ones(count)
        older, newer = self.averages
        rates = torch.where((older > 0) & (newer > 0), newer / older, 1.0).clamp(max=_HIGHEST_RATE)
        return count * torch.softmax(rates / self.temperature, dim=0)

    def end_epoch(self) -> None:
        """Makes the epoch's averages the newest ones, for the tasks that took part in it."""
        if not self.tasks:
            return
        rolled = torch.stack([self.averages[1], self.loss_sum / self.steps])
        self.averages = torch.where(self.steps > 0, rolled, self.averages)
        self.loss_sum.zero_()
        self.steps.zero_()
