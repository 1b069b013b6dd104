"""TaskAdam: an Adam for numbers by task that a method learns; it leaves absent tasks alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class TaskAdam(nn.Module):
    """One number for each task, moved by Adam (Kingma and Ba, ICLR 2015) from where `value` (T,) starts.

    The numbers and all of Adam's state are buffers: they belong to the method's `state_dict`, and not to the parameters
    that the model's optimizer is given.
    """

    value: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, value: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        for name in ("value", "mean", "square", "steps"):
            self.register_buffer(name, value.clone() if name == "value" else torch.zeros_like(value))

    @torch.no_grad()
    def step(self, gradient: Tensor, positions: list[int]) -> None:
        """Descend along the gradient (n,) of the tasks that are present, at these places among the tasks.

        The others' numbers and averages stay as they are.
        """
        state = [[buffer[i] for i in positions] for buffer in (self.value, self.mean, self.square, self.steps)]
        value, mean, square, steps = state
        adam(
            value,
            list(gradient.to(self.value)),
            mean,
            square,
            [],
            steps,
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
