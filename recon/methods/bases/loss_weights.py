"""LossWeights: weightings whose weights are numbers computed from the losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recon.methods.bases.weighting import Weighting


class LossWeights(Weighting):
    """A weighting that says how to weigh the losses of a step, and remembers the latest weight of every task."""

    latest: Tensor

    def _create_state(self) -> None:
        self.register_buffer("latest", torch.ones(len(self.tasks)))

    @abstractmethod
    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        """The weights (n,) of one step's losses (n,), detached: those of the tasks at these positions in `tasks`."""

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        positions = self._positions(losses)
        values = self._stack(losses)
        weights = self._weigh(values.detach().to(self.latest), positions)
        self.latest[positions] = weights
        weights = weights.to(values)
        return (weights * values).sum(), dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        return self.latest if self.tasks else torch.ones(count)
