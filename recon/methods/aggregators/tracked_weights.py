"""Methods that follow MGDA's weights by a few gradient steps a step: SDMGrad, MoDo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torchjd.aggregation import MoDoWeighting, SDMGradWeighting

from recon.errors import UsageError
from recon.methods.bases.solved import Array
from recon.methods.bases.torchjd_aggregator import RememberingTorchJDAggregator
from recon.methods.registry import register


class TrackedWeights(RememberingTorchJDAggregator):
    """A method whose state is weights on the simplex, which every step moves on.

    Where tasks are absent, the others share what they have together.
    """

    _attribute: ClassVar[str]

    def _create_state(self) -> None:
        self.memory["shares"] = torch.full((len(self.tasks),), 1 / len(self.tasks), dtype=torch.float64)

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        shares, count = self.memory["shares"], len(G)
        together = shares[positions].sum()
        start = shares[positions] / together if together > 0 else torch.full((count,), 1 / count, dtype=torch.float64)
        self._lend(self._attribute, start, (count, start.dtype, start.device))
        weights = super()._solve(G, positions)
        shares[positions] = together * self._take_back(self._attribute)
        return count * weights


@register(
    "sdmgrad",
    title="Stochastic direction-oriented multi-objective gradient",
    paper="Xiao, Ban, Ji, NeurIPS 2023, arXiv 2305.18409, Algorithm 1",
    scale="The weights add up to T (the paper's to 1).",
)
class SDMGrad(TrackedWeights):
    """MGDA's weights, pulled towards equal ones, and tracked by projected gradient steps from step to step.

    The paper computes the two factors of the Gramian on two separate batches; here both use the step's batch, so
    that the weights are biased by the noise of the gradients. As in the authors' code, the Gramian is divided
    by the square of the gradients' mean norm.

    Args:
        lam: how much the direction keeps to the mean gradient: 0 is MGDA, and the larger, the nearer to joint training.
        lr: of the gradient steps on the weights, which have a momentum of 0.5. The authors' code takes 10, with which
            the weights of gradients that are nearly orthogonal jump from one corner of the simplex to the other.
        iterations: gradient steps per training step.

    Raises:
        UsageError: lam is negative, or lr or iterations are not positive.
    """

    _attribute = "_w"

    def __init__(self, lam: float = 0.3, lr: float = 0.5, iterations: int = 20) -> None:
        if not 0 <= lam < math.inf:
            raise UsageError(f"SDMGrad's lam must be a finite number of at least 0, but got {lam}.")
        if iterations < 1:
            raise UsageError(f"SDMGrad's iterations must be at least 1, but got {iterations}.")
        if not 0 < lr < math.inf:
            raise UsageError(f"SDMGrad's lr must be positive and finite, but got {lr}.")
        super().__init__(SDMGradWeighting(lr=lr, n_iter=iterations, lambda_=lam))
        self.lam, self.lr, self.iterations = lam, lr, iterations


@register(
    "modo",
    title="Multi-objective gradient with double sampling",
    paper="Chen, Fernando, Ying, Chen, NeurIPS 2023, arXiv 2305.20057, Algorithm 1",
    scale="The weights add up to T (the paper's to 1).",
)
class MoDo(TrackedWeights):
    """MGDA's weights, tracked by one projected gradient step per training step.

    The paper computes the two factors of the Gramian on two separate batches; here both use the step's batch, so
    that the weights are biased by the noise of the gradients. Gradients are counted in units of the step's root
    mean square norm, which the paper leaves to the choice of gamma.

    Args:
        gamma: of the gradient step on the weights.
        rho: how strongly the weights are pulled towards equal ones.

    Raises:
        UsageError: gamma is not positive, or rho is negative.
    """

    _attribute = "_lambda"

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        if not 0 < gamma < math.inf:
            raise UsageError(f"MoDo's gamma must be positive and finite, but got {gamma}.")
        if not 0 <= rho < math.inf:
            raise UsageError(f"MoDo's rho must be a finite number of at least 0, but got {rho}.")
        super().__init__(MoDoWeighting(gamma=gamma, rho=rho))
        self.gamma, self.rho = gamma, rho
