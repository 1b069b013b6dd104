"""Dynamic weight average: losses that fall slowly weigh more."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.weighting import Weighting
from recon.methods.registry import register

_HIGHEST_RATE = 10.0


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

    works_alone = True

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
