"""Methods that weigh the losses: plain sum, uncertainty weighting, dynamic weight average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchjd import scalarization

from recon.errors import UsageError
from recon.methods.base import Weighting
from recon.methods.registry import register


@register(
    "joint",
    title="Joint training",
    paper="Caruana, Machine Learning 28, 1997: all tasks at once, every loss weighted equally",
    scale="The update is the sum of the task gradients.",
)
class Joint(Weighting):
    """The sum of the losses: what multi-task training does when it does nothing else."""

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        values = self._stack(losses)
        return values.sum(), dict(zip(losses, torch.ones_like(values.detach()), strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        return torch.ones(count)


@register(
    "uw",
    title="Uncertainty weighting",
    paper="Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115, eq. (7) with s = log σ²",
    scale="Starts as the sum of the task gradients, then multiplies each by its learned exp(-s).",
)
class UW(Weighting):
    """Weighs every loss by a learned uncertainty: the sum of `exp(-s) L + s`.

    The log-variances s start at 0 and are parameters, made by `setup`, for the caller's optimizer to train
    along with the model, without weight decay. The log-variance of an absent task gets no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uncertainties = nn.ModuleList()

    def _create_state(self) -> None:
        # One module per task: had they one parameter in common, an absent task's log-variance would get a
        # gradient of zero, and the optimizer's momentum would still move it.
        self.uncertainties.extend(scalarization.UW(()) for _ in self.tasks)

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        positions = self._positions(losses)
        values = self._stack(losses)
        terms = [self.uncertainties[i](value) for i, value in zip(positions, values, strict=True)]
        weights = self.weights(len(self.tasks))[positions].to(values)
        # TorchJD keeps the paper's factor 1/2, which would start at half the sum of the losses.
        return 2 * torch.stack(terms).sum(), dict(zip(losses, weights, strict=True))

    @torch.no_grad()
    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        if not self.tasks:
            return torch.ones(count)
        return torch.exp(-torch.stack(list(self.uncertainties.parameters())))


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
    with fewer than two such epochs, or whose average was zero, counts as unchanged: r_k = 1.

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
        self.loss_sum[positions] += values.detach().to(self.loss_sum)
        self.steps[positions] += 1
        weights = self.weights(len(self.tasks))[positions].to(values)
        return (weights * values).sum(), dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        if not self.tasks:
            return torch.ones(count)
        older, newer = self.averages
        rates = torch.where((newer / older).isfinite(), newer / older, 1.0)
        return count * torch.softmax(rates / self.temperature, dim=0)

    def end_epoch(self) -> None:
        """Makes the epoch's averages the newest ones, for the tasks that took part in it."""
        if not self.tasks:
            return
        rolled = torch.stack([self.averages[1], self.loss_sum / self.steps])
        self.averages = torch.where(self.steps > 0, rolled, self.averages)
        self.loss_sum.zero_()
        self.steps.zero_()
