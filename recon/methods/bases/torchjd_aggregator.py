"""TorchJDAggregator: a weighting of TorchJD behind recon's contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import Weighting

from recon.methods.bases.solved import Array, SolvedAggregator
from recon.methods.bases.state import RandomStream, RemembersTasks


class TorchJDAggregator(SolvedAggregator):
    """Passes the Gramian to a weighting of TorchJD, without NaN and in a scale and dtype that it can handle.

    TorchJD draws from the global random generator, which meanwhile continues the method's own stream from `seed`.
    """

    def __init__(self, weighting: Weighting[Any], seed: int = 0) -> None:
        super().__init__()
        self._weighting = weighting
        self.stream = RandomStream(seed)

    def _solve(self, G: Array, positions: Sequence[int]) -> Array:
        with self.stream.lent():
            weights: Array = self._weighting(torch.from_numpy(G)).numpy()
        return weights


class RememberingTorchJDAggregator(RemembersTasks, TorchJDAggregator):
    """The same for a weighting with a state, which TorchJD keeps by row and leaves out of the state_dict.

    The weighting gets the state of the step's rows for the time of the step.
    """

    def _lend(self, attribute: str, state: Tensor, key: tuple[Any, ...]) -> None:
        """Puts the state where the weighting keeps it; the key says what rows it takes it for."""
        for name, value in ((attribute, state), ("_state_key", key)):
            setattr(self._weighting, name, value)

    def _take_back(self, attribute: str) -> Tensor:
        state: Tensor = getattr(self._weighting, attribute)
        setattr(self._weighting, attribute, None)
        return state
