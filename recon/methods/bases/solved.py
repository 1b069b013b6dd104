"""SolvedAggregator: aggregators whose weights solve a small problem in the Gramian."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon.methods.bases.aggregator import GramianAggregator
from recon.methods.bases.zero_gradients import has_direction

Array = NDArray[np.float64]


class SolvedAggregator(GramianAggregator):
    """An aggregator whose weights stay the same when all gradients are multiplied by one number.

    What it solves is small, so it is done on the CPU in float64, with the gradients counted in units of their
    root mean square norm: solvers work best at that scale.

    A task whose gradient is as good as zero (`zero_gradients.NEGLIGIBLE`) is left out, as if it were absent. No
    direction helps or harms it, so it should not matter; but some methods would divide by its length, and others,
    which favour the task that gains least, would not move at all.
    """

    scale_free = True
    memoryless = True

    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        G = self._finite(gramian, tasks)
        positions = self._positions(tasks, len(G))
        weights = torch.ones(len(G), dtype=torch.float64)
        squares = G.diagonal()
        kept = has_direction(squares.sqrt()).nonzero().flatten().tolist()
        if kept:
            units = G[kept][:, kept] / squares[kept].mean()
            weights[kept] = torch.from_numpy(self._solve(units.numpy(), [positions[i] for i in kept]))
        return weights.to(gramian)

    @abstractmethod
    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        """The weights (T,), in sum scale, for the Gramian (T, T), with a diagonal whose mean is 1.

        The positions say which of `self.tasks` the rows are, for a method that keeps something by task.
        """
