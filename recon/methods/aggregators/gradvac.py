"""GradVac: changes gradients so that they have their usual cosines with each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchjd.aggregation import GradVacWeighting

from recon.errors import UsageError
from recon.methods.bases.solved import Array
from recon.methods.bases.torchjd_aggregator import RememberingTorchJDAggregator
from recon.methods.registry import register

# A target this near to 1 would divide by the sine of an angle of zero.
_HIGHEST_TARGET = 1 - 1e-6


@register(
    "gradvac",
    title="Gradient vaccine",
    paper="Wang, Tsvetkov, Firat, Cao, ICLR 2021, arXiv 2010.05874, Algorithm 1",
    scale="The sum of the altered task gradients: the sum of the task gradients where none is altered. Longer, where "
    "gradients that used to agree no longer do.",
)
class GradVac(RememberingTorchJDAggregator):
    """Gives each gradient the cosines with the others that it usually has, where it has less, and sums.

    The usual cosine of a pair is an exponential moving average over the steps in which both took part; it starts at
    0, where the method is PCGrad. All shared parameters are taken together. A task whose gradient is zero is left out.

    Args:
        beta: the weight of the newest cosine in the average.
        seed: of the method's own random stream, which gives the orders, as in `PCGrad`.

    Raises:
        UsageError: beta is not between 0 and 1.
    """

    def __init__(self, beta: float = 0.01, seed: int = 0) -> None:
        if not 0 <= beta <= 1:
            raise UsageError(f"GradVac's beta must be a number from 0 to 1, but got {beta}.")
        super().__init__(GradVacWeighting(beta=beta, eps=1e-30), seed)
        self.beta = beta
        self.seed = seed

    def _create_state(self) -> None:
        self.memory["targets"] = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        rows = torch.tensor(positions)
        pairs = rows[:, None], rows
        self._lend("_phi_t", self.memory["targets"][pairs], (len(rows), torch.float64))
        weights = super()._solve(G, positions)
        self.memory["targets"][pairs] = self._take_back("_phi_t").clamp(max=_HIGHEST_TARGET)
        return weights
