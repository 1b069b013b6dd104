"""FAMO: weights learned from what each step did to the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.loss_weights import LossWeights
from recon.methods.bases.task_adam import TaskAdam
from recon.methods.registry import register

_NEGLIGIBLE = 1e-8  # of the step's largest loss: less is a loss of zero, whose logarithm says nothing


# TorchJD has a FAMO too, but the state of its Adam is not in the state_dict, and it knows no absent tasks.
@register(
    "famo",
    title="Fast adaptive multitask optimization",
    paper="Liu, Feng, Stone, Liu, NeurIPS 2023, arXiv 2306.03792, Algorithm 1, with Adam as in the published code",
    scale="T times the paper's update: the weights of a step's tasks, z / L rescaled, add up to their number T.",
)
class FAMO(LossWeights):
    """Lets all losses fall at the same rate: each is weighed by z / L, with z the softmax of learned logits.

    A loss that fell more than the others in the last step, in its logarithm, gets a smaller logit. The logits are the
    method's own, not for the caller's optimizer; absent tasks keep theirs. A task whose loss is 0, or below 1e-8 of the
    step's largest, has nothing to gain: it counts as absent, where z / L would leave nothing for the others.

    Args:
        lr: of Adam on the logits.
        weight_decay: of the logits, the paper's gamma.

    Raises:
        UsageError: lr is not a positive number, or weight_decay not one of at least 0; from `combine` and `after_step`:
            a loss is negative.
    """

    needs_new_losses = True
    scale_free = True
    before: Tensor

    def __init__(self, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__()
        if not 0 < lr < math.inf:
            raise UsageError(f"FAMO's lr must be positive and finite, but got {lr}.")
        if not 0 <= weight_decay < math.inf:
            raise UsageError(f"FAMO's weight_decay must be a finite number of at least 0, but got {weight_decay}.")
        self.lr = lr
        self.weight_decay = weight_decay

    def _create_state(self) -> None:
        super()._create_state()
        self.logits = TaskAdam(torch.zeros(len(self.tasks)), self.lr, self.weight_decay)
        self.register_buffer("before", torch.full((len(self.tasks),), math.nan))

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`; tasks that are left out have no weight."""
        positions = self._positions(losses)
        values = self._stack(losses).detach()
        self._refuse(values < 0, positions, "takes the logarithms of losses of at least 0")
        self.before.fill_(math.nan)
        counts = _counts(values).tolist()
        kept = {task: loss for (task, loss), counted in zip(losses.items(), counts, strict=True) if counted}
        if kept:
            return super().combine(kept)
        return 0 * self._stack(losses).sum(), {}  # all are 0: there is nothing to learn

    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        self.before[list(positions)] = losses
        # z / L in logarithms, for losses of any size.
        return len(losses) * torch.softmax(self._log_z(positions) - losses.log(), dim=0)

    @torch.no_grad()
    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Learns from the same batch's losses after the step; tasks that took no part in it are passed over."""
        at = self._positions(losses)
        values = torch.stack([loss.detach() for loss in losses.values()]).to(self.before)
        self._refuse(values < 0, at, "takes the logarithms of losses of at least 0")
        known = self.before[at].isfinite() & _counts(values)
        positions = [i for i, counted in zip(at, known.tolist(), strict=True) if counted]
        if positions:
            fell = self.before[positions].log() - values[known].log()
            z = self._log_z(positions).exp()
            self.logits.step(z * (fell - z @ fell), positions)  # the softmax's derivative, applied to how far each fell
        self.before.fill_(math.nan)

    def _log_z(self, positions: Sequence[int]) -> Tensor:
        return torch.log_softmax(self.logits.value[list(positions)], dim=0)


def _counts(losses: Tensor) -> Tensor:
    """Which of the losses are more than nothing; one that is not finite counts, to be seen."""
    largest = losses.where(losses.isfinite(), 0.0).max()
    return ~(losses <= _NEGLIGIBLE * largest)
