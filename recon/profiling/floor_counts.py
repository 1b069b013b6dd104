"""FloorCounts: counts how often gradients at the same weights conflict only because their batches differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class FloorCounts:
    """Counts of the cosines between the gradients of two batches, kept on their device.

    Args:
        layers: the number of layers.
        edges: the thresholds; a cosine strictly below one counts for it.
        device: where the counts are.
    """

    def __init__(self, layers: int, edges: Sequence[float], device: torch.device) -> None:
        self._edges = edges
        # (layers, 1 + thresholds, tasks, tasks): observed, and below each threshold. A task with itself on the
        # diagonal, a pair across the batches in the upper triangle.
        self._counts = torch.zeros(layers, 1 + len(edges), 0, 0, dtype=torch.int64, device=device)

    def add(
        self, layers: Sequence[int], tasks: Sequence[int], products: Tensor, norms: Tensor, second_norms: Tensor
    ) -> None:
        """Count one floor step, see `Tally.add_floor`."""
        device = self._counts.device
        products, norms, second_norms = (values.to(device) for values in (products, norms, second_norms))
        self._grow(max(tasks, default=-1) + 1)
        scale = norms.unsqueeze(2) * second_norms.unsqueeze(1)
        finite = products.isfinite().all() & scale.isfinite().all()
        cosines = products / scale
        edges = torch.tensor(self._edges, dtype=cosines.dtype, device=device).view(-1, 1, 1, 1)
        seen = ((scale > 0) & finite).unsqueeze(0)
        marks = torch.cat([seen, seen & (cosines < edges)]).transpose(0, 1).to(self._counts.dtype)
        rows = torch.tensor(list(layers), dtype=torch.int64, device=device).view(-1, 1, 1, 1)
        kinds = torch.arange(marks.shape[1], device=device).view(1, -1, 1, 1)
        numbers = torch.tensor(list(tasks), device=device)
        first, second = torch.meshgrid(numbers, numbers, indexing="ij")
        cells = (rows, kinds, torch.minimum(first, second), torch.maximum(first, second))
        self._counts.index_put_(cells, marks, accumulate=True)

    def counts(self, tasks: int) -> Tensor:
        """(layers, 1 + thresholds, T, T) on the CPU: observed and below each threshold; see `recon.maps.LayerFloor`."""
        self._grow(tasks)
        return self._counts.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that was counted."""
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._counts = state["counts"].to(self._counts.device)

    def _grow(self, tasks: int) -> None:
        more = tasks - self._counts.shape[-1]
        if more > 0:
            self._counts = pad(self._counts, (0, more, 0, more))
