"""Random loss weighting: new weights in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recon.methods.bases.loss_weights import LossWeights
from recon.methods.registry import register


# TorchJD's Random draws from the global generator.
@register(
    "rlw",
    title="Random loss weighting",
    paper="Lin, Ye, Zhang, Tsang, TMLR 2022, arXiv 2111.10603, Algorithm 2 with standard normal weights",
    scale="The weights of a step's tasks add up to their number T; on average, each is 1.",
)
class RLW(LossWeights):
    """Weighs the losses of each step by T times the softmax of T standard normal numbers.

    Args:
        seed: of the method's own random stream. It gives a number for every task of the run in every step, absent
            ones included. The global random state is neither read nor changed, and the stream is part of the
            state_dict.
    """

    memoryless = True

    scale_free = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._stream = torch.Generator().manual_seed(seed)

    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        drawn = torch.randn(len(self.tasks), generator=self._stream)[list(positions)]
        return len(losses) * torch.softmax(drawn, dim=0).to(losses)

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks' names, and the position in the random stream. Not a buffer: generator states live on the CPU."""
        return super().get_extra_state() | {"stream": self._stream.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues where the saved stream was."""
        super().set_extra_state(state)
        self._stream.set_state(state["stream"].cpu())
