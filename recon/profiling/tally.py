"""Tally: counts the cosines between task gradients by layer, by task pair and by stretch of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recon.maps.counts import BINS, SERIES, STAGES, bin_edges, threshold_bin, thresholds_around
from recon.profiling.floor_counts import FloorCounts

_BLOCKS = 64  # the training is kept in at most this many equal blocks, so that it can be cut into quarters at any end
_PENDING = 1 << 17  # cosines that wait to be counted together: a step's own are too few to be worth a kernel each


class Tally:
    """Counts of cosines, kept on the gradients' device; reading them is the only time that waits for it.

    Cosines strictly below the threshold are conflicts.
    """

    def __init__(self, layers: int, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.thresholds = thresholds_around(threshold)
        self.steps = 0
        self._histogram = torch.zeros(layers, BINS, dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        # (blocks, layers, 2: conflicts and observed, tasks, tasks), the upper triangles used
        self._pairs = _Blocks(torch.zeros(_BLOCKS, layers, 2, 0, 0, dtype=torch.int32, device=device))
        self._series = _Blocks(torch.zeros(SERIES, layers, dtype=torch.int32, device=device))
        # (thresholds, layers, tasks, tasks), the upper triangles used; None once a profile from before goes on
        below = torch.zeros(len(self.thresholds), layers, 0, 0, dtype=torch.int32, device=device)
        self._below: Tensor | None = below
        edges = bin_edges()[[threshold_bin(s) for s in self.thresholds]].tolist()
        self._floor = FloorCounts(layers, edges, device)
        self._pending: list[Tensor] = []
        self._pending_of: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def add(self, layers: Sequence[int], tasks: Sequence[int], gramians: Tensor) -> None:
        """Count one step, from the Gramians (L, T, T) of the L layers and T tasks of these numbers.

        A zero on a diagonal means that the task has no gradient there.
        """
        if self._pending_of != (tuple(layers), tuple(tasks)):
            self._flush()
            self._pending_of = tuple(layers), tuple(tasks)
        for blocks in (self._pairs, self._series):
            if self.steps == blocks.room:
                blocks.merge()
        self._pending.append(gramians)
        self.steps += 1
        if len(self._pending) * gramians.numel() >= _PENDING:
            self._flush()

    def add_floor(
        self, layers: Sequence[int], tasks: Sequence[int], products: Tensor, norms: Tensor, second_norms: Tensor
    ) -> None:
        """Count one floor step: the gradients g_i of one batch and g'_i of a second one, at the same weights.

        A step with anything that is not finite is left out; a zero norm means that the task has no gradient there.

        Args:
            layers: the numbers of the L layers.
            tasks: the numbers of the T tasks.
            products: (L, T, T) the products g_i . g'_j.
            norms: (L, T) the norms |g_i|.
            second_norms: (L, T) the norms |g'_i|.
        """
        self._floor.add(layers, tasks, products, norms, second_norms)

    @property
    def histogram(self) -> Tensor:
        """(layers, 200) cosines by bin, on the CPU."""
        self._flush()
        return self._histogram.cpu()

    @property
    def skipped(self) -> int:
        """The number of steps that had a gradient that was not finite; they are in no other count."""
        self._flush()
        return int(self._skipped)

    def by_stage(self, tasks: int) -> tuple[Tensor, Tensor, list[int]]:
        """The counts by quarter of the training; a block belongs where its middle lies.

        Conflicts and observed cosines, each (4, layers, T, T) with the upper triangles used, on the CPU; and the steps
        of each quarter.
        """
        self._flush()
        self._grow(tasks)
        stages = torch.zeros(STAGES, *self._pairs.counts.shape[1:], dtype=torch.int64)
        stage_steps = [0] * STAGES
        for block, counts in enumerate(self._pairs.counts.cpu()):
            start, stop = (min(self.steps, i * self._pairs.length) for i in (block, block + 1))
            stage = min(STAGES - 1, STAGES * (start + stop) // (2 * max(1, self.steps)))
            stages[stage] += counts
            stage_steps[stage] += stop - start
        return stages[:, :, 0], stages[:, :, 1], stage_steps

    def below(self, tasks: int) -> Tensor | None:
        """(thresholds, layers, T, T) cosines below each of `thresholds`, the upper triangles used, on the CPU.

        None where a profile goes on that was begun before recon counted them.
        """
        self._flush()
        self._grow(tasks)
        return None if self._below is None else self._below.cpu()

    def floor(self, tasks: int) -> Tensor:
        """See `FloorCounts.counts`."""
        return self._floor.counts(tasks)

    def pair_series(self, tasks: int) -> tuple[Tensor, int]:
        """By stretch of training, on the CPU, and the steps of a bin.

        (bins, layers, 2, T, T): conflicts and observed cosines, the upper triangles used.
        """
        self._flush()
        self._grow(tasks)
        length = self._pairs.length
        return self._pairs.counts[: -(-self.steps // length)].cpu(), length

    def series(self) -> tuple[Tensor, int]:
        """(bins, layers) conflicts over all pairs by stretch of training, on the CPU; and the steps of a bin."""
        self._flush()
        length = self._series.length
        return self._series.counts[: -(-self.steps // length)].cpu(), length

    def state_dict(self) -> dict[str, Any]:
        """Everything that was counted."""
        self._flush()
        return {
            "steps": self.steps,
            "histogram": self._histogram,
            "skipped": self._skipped,
            "pairs": self._pairs.counts,
            "pairs_length": self._pairs.length,
            "series": self._series.counts,
            "series_length": self._series.length,
            "below": self._below,
            "floor": self._floor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, also of a recon that did not count all of it."""
        device = self._histogram.device
        self.steps = state["steps"]
        self._histogram, self._skipped = state["histogram"].to(device), state["skipped"].to(device)
        self._pairs = _Blocks(state["pairs"].to(device), state["pairs_length"])
        self._series = _Blocks(state["series"].to(device), state["series_length"])
        below = state.get("below")
        self._below = None if below is None else below.to(device)
        if "floor" in state:
            self._floor.load_state_dict(state["floor"])
        self._pending = []

    def _flush(self) -> None:
        """Count the steps that wait."""
        if not self._pending:
            return
        gramians = torch.stack(self._pending)
        first_step = self.steps - len(self._pending)
        self._pending = []
        layers, tasks = (torch.tensor(of, dtype=torch.int64, device=gramians.device) for of in self._pending_of)
        finite = gramians.isfinite().flatten(start_dim=1).all(dim=1)
        self._skipped += (~finite).sum()
        i, j = torch.triu_indices(len(tasks), len(tasks), offset=1, device=gramians.device)
        norms = gramians.diagonal(dim1=2, dim2=3).sqrt()
        # A zero gradient, as of a task that does not reach the layer, has no direction to compare.
        scales = norms[..., i] * norms[..., j]
        seen = (scales > 0) & finite.view(-1, 1, 1)
        cosines = gramians[..., i, j] / scales
        edges = torch.as_tensor(bin_edges(), dtype=cosines.dtype, device=cosines.device)
        conflicts = seen & (cosines < edges[threshold_bin(self.threshold)])
        self._grow(int(max(self._pending_of[1], default=-1)) + 1)
        cells = torch.minimum(tasks[i], tasks[j]) * self._tasks + torch.maximum(tasks[i], tasks[j])
        steps = torch.arange(first_step, first_step + len(gramians), device=gramians.device)
        self._count_bins(layers, cosines, seen, edges)
        self._count_series(steps, layers, conflicts)
        self._count_pairs(first_step, layers, cells, conflicts, seen)
        self._count_below(layers, cells, cosines.where(seen, 1), edges)

    def _count_bins(self, layers: Tensor, cosines: Tensor, seen: Tensor, edges: Tensor) -> None:
        bins = (torch.bucketize(cosines, edges, right=True) - 1).clamp_(0, BINS - 1)
        cells = layers.view(1, -1, 1) * BINS + bins
        self._histogram.view(-1).index_add_(0, cells.flatten(), seen.flatten().to(self._histogram.dtype))

    def _count_series(self, steps: Tensor, layers: Tensor, conflicts: Tensor) -> None:
        counts = self._series.counts
        rows = (steps // self._series.length).view(-1, 1)
        counts.index_put_((rows, layers.view(1, -1)), conflicts.sum(dim=2, dtype=counts.dtype), accumulate=True)

    def _count_pairs(self, first_step: int, layers: Tensor, cells: Tensor, conflicts: Tensor, seen: Tensor) -> None:
        length = self._pairs.length
        start, last = first_step // length, (first_step + len(seen) - 1) // length
        blocks = torch.arange(first_step, first_step + len(seen), device=seen.device) // length - start
        for kind, marks in enumerate((conflicts, seen)):
            table = self._pairs.counts[start : last + 1, :, kind]
            counts = torch.zeros(len(table), *marks.shape[1:], dtype=table.dtype, device=table.device)
            _add(table, layers, cells, counts.index_add_(0, blocks, marks.to(table.dtype)))

    def _count_below(self, layers: Tensor, cells: Tensor, cosines: Tensor, edges: Tensor) -> None:
        if self._below is not None:
            kept = edges[[threshold_bin(threshold) for threshold in self.thresholds]]
            _add(
                self._below,
                layers,
                cells,
                torch.stack([(cosines < edge).sum(dim=0, dtype=torch.int32) for edge in kept]),
            )

    @property
    def _tasks(self) -> int:
        """How many tasks there is room for."""
        return self._pairs.counts.shape[-1]

    def _grow(self, tasks: int) -> None:
        more = tasks - self._tasks
        if more > 0:
            self._pairs.counts = pad(self._pairs.counts, (0, more, 0, more))
            self._below = None if self._below is None else pad(self._below, (0, more, 0, more))


def _add(table: Tensor, layers: Tensor, cells: Tensor, counts: Tensor) -> None:
    """Add counts (B, L, pairs) to a table (B, layers, T, T): to these layers, in the cells of these pairs."""
    table = table.view(*table.shape[:2], -1)
    rows = table.index_select(1, layers)
    table.index_copy_(1, layers, rows.index_add_(2, cells, counts.to(table.dtype)))


class _Blocks:
    """Counts (blocks, ...) by block of `length` consecutive steps: when all blocks are full, they double in length."""

    def __init__(self, counts: Tensor, length: int = 1) -> None:
        self.counts = counts
        self.length = length

    @property
    def room(self) -> int:
        """The steps that fit."""
        return len(self.counts) * self.length

    def merge(self) -> None:
        """Make each two neighbours one."""
        merged = self.counts.unflatten(0, (-1, 2)).sum(dim=1, dtype=self.counts.dtype)
        self.counts = torch.cat([merged, torch.zeros_like(merged)])
        self.length *= 2
