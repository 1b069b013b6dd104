"""Tally: counts the cosines between task gradients by layer, by task pair and by stretch of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from recon.conflict_map import BINS, STAGES, bin_edges

_BLOCKS = 64  # the training is kept in at most this many equal blocks, so that it can be cut into quarters at any end
_PENDING = 1 << 17  # cosines that wait to be counted together: a step's own are too few to be worth a kernel each


class Tally:
    """Counts of cosines, kept on the gradients' device; reading them is the only time that waits for it.

    Args:
        layers: how many layers there are.
        threshold: S; cosines strictly below it are conflicts.
        device: where the Gramians come from.
    """

    def __init__(self, layers: int, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.steps = 0
        self._histogram = torch.zeros(layers, BINS, dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        # (2: conflicts and observed, blocks, layers, tasks, tasks), the upper triangles used
        self._counts = torch.zeros(2, _BLOCKS, layers, 0, 0, dtype=torch.int32, device=device)
        self._block_length = 1
        self._pending: list[Tensor] = []
        self._pending_of: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def add(self, layers: Sequence[int], tasks: Sequence[int], gramians: Tensor) -> None:
        """Count one step.

        Args:
            layers: the numbers of the L layers that were shared in this step.
            tasks: the numbers of the T tasks that took part.
            gramians: (L, T, T); a zero on the diagonal means that the task has no gradient there.
        """
        if self._pending_of != (tuple(layers), tuple(tasks)):
            self._flush()
            self._pending_of = tuple(layers), tuple(tasks)
        if self.steps == _BLOCKS * self._block_length:
            self._flush()
            self._merge_blocks()
        self._pending.append(gramians)
        self.steps += 1
        if len(self._pending) * gramians.numel() >= _PENDING:
            self._flush()

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

        Args:
            tasks: how many tasks there are, T.

        Returns:
            conflicts and observed cosines, each (4, layers, T, T) with the upper triangles used, on the CPU; and
            the steps of each quarter.
        """
        self._flush()
        self._grow(tasks)
        stages = torch.zeros(2, STAGES, *self._counts.shape[2:], dtype=torch.int64)
        stage_steps = [0] * STAGES
        for block, counts in enumerate(self._counts.cpu().unbind(dim=1)):
            start, stop = (min(self.steps, i * self._block_length) for i in (block, block + 1))
            stage = min(STAGES - 1, STAGES * (start + stop) // (2 * max(1, self.steps)))
            stages[:, stage] += counts
            stage_steps[stage] += stop - start
        return stages[0], stages[1], stage_steps

    def _flush(self) -> None:
        """Count the steps that wait."""
        if not self._pending:
            return
        device = self._counts.device
        layers, tasks = (torch.tensor(of, dtype=torch.int64, device=device) for of in self._pending_of)
        gramians = torch.stack(self._pending)
        first_step = self.steps - len(self._pending)
        self._pending = []
        blocks = torch.arange(first_step, first_step + len(gramians), device=gramians.device) // self._block_length
        finite = gramians.isfinite().flatten(start_dim=1).all(dim=1)
        self._skipped += (~finite).sum()
        i, j = torch.triu_indices(len(tasks), len(tasks), offset=1, device=gramians.device)
        norms = gramians.diagonal(dim1=2, dim2=3).sqrt()
        # A zero gradient, as of a task that does not reach the layer, has no direction to compare.
        seen = (norms[..., i] > 0) & (norms[..., j] > 0) & finite.view(-1, 1, 1)
        cosines = gramians[..., i, j] / (norms[..., i] * norms[..., j])
        self._count_bins(layers, cosines, seen)
        self._count_pairs(blocks, layers, tasks[i], tasks[j], seen & (cosines < self.threshold), seen)

    def _count_bins(self, layers: Tensor, cosines: Tensor, seen: Tensor) -> None:
        edges = torch.as_tensor(bin_edges(), dtype=cosines.dtype, device=cosines.device)
        bins = (torch.bucketize(cosines, edges, right=True) - 1).clamp_(0, BINS - 1)
        cells = layers.view(1, -1, 1) * BINS + bins
        self._histogram.view(-1).index_add_(0, cells.flatten(), seen.flatten().to(self._histogram.dtype))

    def _count_pairs(
        self, blocks: Tensor, layers: Tensor, first: Tensor, second: Tensor, conflicts: Tensor, seen: Tensor
    ) -> None:
        self._grow(int(max(self._pending_of[1])) + 1)
        _, _, count, tasks, _ = self._counts.shape
        pairs = torch.minimum(first, second) * tasks + torch.maximum(first, second)
        cells = (blocks.view(-1, 1, 1) * count + layers.view(1, -1, 1)) * tasks**2 + pairs
        for counts, marks in zip(self._counts, (conflicts, seen), strict=True):
            counts.view(-1).index_add_(0, cells.flatten(), marks.flatten().to(counts.dtype))

    def _grow(self, tasks: int) -> None:
        more = tasks - self._counts.shape[-1]
        if more > 0:
            self._counts = pad(self._counts, (0, more, 0, more))

    def _merge_blocks(self) -> None:
        _, _, *shape = self._counts.shape
        merged = self._counts.view(2, _BLOCKS // 2, 2, *shape).sum(dim=2, dtype=self._counts.dtype)
        self._counts = torch.cat([merged, torch.zeros_like(merged)], dim=1)
        self._block_length *= 2
