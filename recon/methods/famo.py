"""FAMO: weights learned from what each step did to the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.loss_weights import LossWeights
from recon.methods.registry import register
from recon.methods.task_adam import TaskAdam

_SMALLEST = 1e-8  # what a loss of zero counts as: its logarithm is taken


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
    method's own, not for the caller's optimizer; absent tasks keep theirs.

    Args:
        lr: of Adam on the logits.
        weight_decay: of the logits, the paper's gamma.

    Raises:
        UsageError: lr is not a positive number, or weight_decay not one of at least 0; from `combine` and `after_step`:
            a loss is negative.
    """

    needs_new_losses = True
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

    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        losses = self._checked(losses, positions)
        self.before.fill_(math.nan)
        self.before[list(positions)] = losses
        # z / L in logarithms, for losses of any size.
        return len(losses) * torch.softmax(self._log_z(positions) - losses.log(), dim=0)

    @torch.no_grad()
    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Learns from the same batch's losses after the step; tasks that took no part in it are passed over."""
        positions = [i for i in self._positions(losses) if not self.before[i].isnan()]
        if not positions:
            return
        values = torch.stack([losses[self.tasks[i]].detach() for i in positions]).to(self.before)
        fell = self.before[positions].log() - self._checked(values, positions).log()
        z = self._log_z(positions).exp()
        self.logits.step(z * (fell - z @ fell), positions)  # the softmax's derivative, applied to how far each fell
        self.before.fill_(math.nan)

    def _log_z(self, positions: Sequence[int]) -> Tensor:
        return torch.log_softmax(self.logits.value[list(positions)], dim=0)

    def _checked(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        self._refuse(losses < 0, positions, "takes the logarithms of losses that are 0 at least")
        return losses.clamp(min=_SMALLEST)
