"""LearnedScales: weightings whose weights are parameters, trained by the optimizer that trains the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from recon.methods.bases.weighting import Weighting


class LearnedScales(Weighting):
    """Weighs every loss by a learned number s, whose own term in the objective keeps it from running away.

    Every s starts at 0, where all weights are 1. They are parameters, made by `setup`, for the caller's optimizer to
    train along with the model, without weight decay. Those of absent tasks get no gradient, and that of a task whose
    loss is exactly 0 gets a gradient of 0: such a loss does not show how large its weight should be, and the term of s
    alone would let it grow without bound.

    Attributes:
        factor: of TorchJD's objective, for weights of 1 at the start.
    """

    factor: ClassVar[float] = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList()

    @abstractmethod
    def _scalarizer(self) -> nn.Module:
        """A TorchJD scalarizer of one loss, with one parameter."""

    @abstractmethod
    def _weight(self, s: Tensor) -> Tensor:
        """What a loss with this parameter is multiplied by."""

    def _create_state(self) -> None:
        # One module per task: had they one parameter in common, an absent task's would get a gradient of zero, and
        # the optimizer's momentum would still move it.
        self.scales.extend(self._scalarizer() for _ in self.tasks)

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        positions = self._positions(losses)
        values = self._stack(losses)
        terms = torch.stack([self.scales[i](value) for i, value in zip(positions, values, strict=True)])
        weights = self.weights(len(self.tasks))[positions].to(values)
        total = torch.where(values.detach() == 0, weights * values, self.factor * terms).sum()
        return total, dict(zip(losses, weights, strict=True))

    @torch.no_grad()
    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        return self._weight(torch.stack(list(self.scales.parameters()))) if self.tasks else torch.ones(count)
