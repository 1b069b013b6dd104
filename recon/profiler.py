"""Profiler: counts, while a model trains, how often the tasks' gradients conflict in each shared layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recon.conflict_map import BINS, STAGES, ConflictMap, LayerConflicts, bin_edges, threshold_bin
from recon.errors import GradientError, UsageError
from recon.gradients import TaskJacobian, cosines_of, layer_gramians
from recon.layers import find_layers
from recon.methods import Method
from recon.problem import Batch, Loss
from recon.trainer import Epoch, train
from recon.updates import backward

_BLOCKS = 64  # training time is kept in at most this many equal blocks, so that quarters can be formed at any end


class Profiler:
    """Records S-conflict scores from the task gradients of a training run (Shi et al. 2023, definition 4).

    In a training loop of one's own it takes the place of `sum(losses).backward()`:

        profiler = recon.Profiler(model)
        profiler.backward({"seg": loss_a, "depth": loss_b}); optimizer.step()
        cmap = profiler.conflict_map()

    Args:
        model: the model that trains; any layer may be shared, frozen ones take no part.
        threshold: S in (-1, 0], a multiple of 0.01. The scores at other thresholds can be had later all the same;
            counts by task pair and stage of training are kept at this one.
        tasks: fixes the order of the tasks in the map; found as they come when not given.

    Raises:
        UsageError: the threshold is off the grid.
    """

    def __init__(self, model: nn.Module, threshold: float = -0.1, tasks: Sequence[str] = ()) -> None:
        threshold_bin(threshold)
        self.model = model
        self.threshold = threshold
        self.layers = find_layers(model)
        # In layer order, so that each layer is one block of columns in the Jacobian.
        self.parameters = [p for layer in self.layers for p in layer.parameters.values()]
        self._layer_of = {p: i for i, layer in enumerate(self.layers) for p in layer.parameters.values()}
        self._tasks = list(tasks)
        self._steps = 0
        self._block_length = 1
        self._blocks: list[_Block] = []
        self._histogram: Tensor | None = None
        self._skipped: Tensor | None = None
        self._shared: set[int] = set()

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Record one step, and leave `.grad` as `sum(losses).backward()` would.

        Args:
            losses: `{task name: scalar loss}`; a task missing from the batch is left out.

        Raises:
            GradientError: a task's loss depends on no trainable parameter.
        """
        backward(losses, self.model, profiler=self)

    @torch.no_grad()
    def observe(self, jacobian: TaskJacobian) -> None:
        """Record one step's task gradients.

        Args:
            jacobian: taken with respect to `self.parameters`, in their order.
        """
        at = torch.tensor([self._index(task) for task in jacobian.tasks], device=jacobian.matrix.device)
        block = self._current_block(jacobian.matrix.device)
        self._steps += 1
        block.steps += 1
        if not jacobian.shared:
            return
        layers, gramians, reached = layer_gramians(jacobian, self._layer_of)
        self._shared.update(layers)
        # A pair counts where both tasks reach the layer; a zero gradient has no direction to compare.
        usable = reached & (gramians.diagonal(dim1=1, dim2=2) > 0)
        finite = gramians.isfinite().all()
        pairs = (usable.unsqueeze(2) & usable.unsqueeze(1)).triu(diagonal=1) & finite
        cosines = cosines_of(gramians)
        self._count(block, torch.tensor(layers, device=at.device), at, cosines, pairs, finite)

    def _count(self, block: _Block, rows: Tensor, at: Tensor, cosines: Tensor, pairs: Tensor, finite: Tensor) -> None:
        histogram, skipped = self._histogram, self._skipped
        assert histogram is not None and skipped is not None
        skipped += ~finite
        edges = torch.as_tensor(bin_edges(), dtype=cosines.dtype, device=cosines.device)
        bins = (torch.bucketize(cosines, edges, right=True) - 1).clamp_(0, BINS - 1)
        cells = rows.view(-1, 1, 1) * BINS + bins
        histogram.view(-1).index_add_(0, cells.flatten(), pairs.flatten().to(histogram.dtype))
        place = (rows.view(-1, 1, 1), torch.minimum(at.view(1, -1, 1), at), torch.maximum(at.view(1, -1, 1), at))
        place = tuple(torch.broadcast_tensors(*place))
        block.observed.index_put_(place, pairs.to(block.observed.dtype), accumulate=True)
        conflicts = pairs & (cosines < self.threshold)
        block.conflicts.index_put_(place, conflicts.to(block.conflicts.dtype), accumulate=True)

    def conflict_map(self, made_by: Mapping[str, Any] | None = None) -> ConflictMap:
        """What has been counted so far.

        Args:
            made_by: how the map was made, to be kept in its file.

        Raises:
            UsageError: nothing was recorded, or no layer is shared.
            GradientError: no step had finite gradients.
        """
        if not self._steps or self._histogram is None or self._skipped is None:
            raise UsageError("Nothing was profiled yet: call profiler.backward(losses) in the training loop first.")
        if not self._shared:
            raise UsageError(
                f"No layer is shared: in none of {self._steps} steps did the losses of two tasks depend on the same "
                "trainable layer. A batch needs the targets of two tasks or more, and the tasks a common backbone."
            )
        skipped = int(self._skipped)
        if skipped == self._steps:
            raise GradientError(
                f"The gradients of all {self._steps} steps were infinite or NaN, so nothing could be counted. Lower "
                "the learning rate, or look at the losses."
            )
        stages = self._by_stage()
        histogram = self._histogram.cpu().numpy()
        first, second = np.triu_indices(len(self._tasks), k=1)
        layers = []
        for i in sorted(self._shared):
            layer = self.layers[i]
            conflicts = np.stack([stage.conflicts[i].cpu().numpy()[first, second] for stage in stages])
            observed = np.stack([stage.observed[i].cpu().numpy()[first, second] for stage in stages])
            layers.append(
                LayerConflicts(layer.name, layer.kind, layer.shapes, histogram[i].copy(), conflicts, observed)
            )
        return ConflictMap(
            tasks=tuple(self._tasks),
            threshold=self.threshold,
            steps=self._steps,
            skipped=skipped,
            stage_steps=tuple(stage.steps for stage in stages),
            layers=layers,
            made_by=dict(made_by or {}),
        )

    def _index(self, task: str) -> int:
        if task not in self._tasks:
            self._tasks.append(task)
            for block in self._blocks:
                block.grow(len(self._tasks))
        return self._tasks.index(task)

    def _current_block(self, device: torch.device) -> _Block:
        if self._histogram is None:
            self._histogram = torch.zeros(len(self.layers), BINS, dtype=torch.int64, device=device)
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        if self._blocks and self._blocks[-1].steps < self._block_length:
            return self._blocks[-1]
        if len(self._blocks) == _BLOCKS:
            self._blocks = [a.add(b) for a, b in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
            self._block_length *= 2
        self._blocks.append(_Block.empty(len(self.layers), len(self._tasks), device))
        return self._blocks[-1]

    def _by_stage(self) -> list[_Block]:
        """The blocks summed by quarter of the training; a block belongs where its middle lies."""
        device = self._blocks[0].observed.device
        stages = [_Block.empty(len(self.layers), len(self._tasks), device) for _ in range(STAGES)]
        done = 0
        for block in self._blocks:
            middle = done + block.steps / 2
            stage = min(STAGES - 1, int(STAGES * middle / self._steps))
            stages[stage] = stages[stage].add(block)
            done += block.steps
        return stages


def profile(
    model: nn.Module,
    loader: Iterable[Batch],
    losses: Mapping[str, Loss],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int = 3,
    threshold: float = -0.1,
    method: str | Method = "joint",
    made_by: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
) -> ConflictMap:
    """Warm-up training that scores every shared layer (Shi et al. 2023, algorithm 1, lines 1-9).

    The scored gradients train the model too: it ends as the same training without profiling would leave it, to
    rounding.

    Args:
        model: `model(inputs) -> {task name: output}`; it is trained in place.
        loader: yields `(inputs, {task name: target})`.
        losses: `{task name: (output, target) -> scalar}`.
        optimizer: of the model's parameters.
        epochs: passes over the loader.
        threshold: S in (-1, 0], a multiple of 0.01.
        method: the gradient method of the warm-up.
        made_by: what else the map's file should say of how it was made.
        on_epoch: called with the epoch's record after each epoch.
        progress: show a progress bar on stderr.

    Raises:
        ProblemError: model, losses and batches do not fit together.
        GradientError: a loss is not finite, or a task has no gradient anywhere.
        UsageError: the threshold is off the grid, or no layer is shared.
    """
    profiler = Profiler(model, threshold, tuple(losses))
    history = train(
        model,
        loader,
        losses,
        method=method,
        optimizer=optimizer,
        epochs=epochs,
        profiler=profiler,
        on_epoch=on_epoch,
        progress=progress,
    )
    how = {
        "method": method if isinstance(method, str) else method.name,
        "optimizer": type(optimizer).__name__,
        "learning_rate": optimizer.param_groups[0].get("lr"),
        "epochs": epochs,
        "seconds": round(history.seconds, 2),
        "torch": torch.__version__,
    }
    return profiler.conflict_map({**how, **(made_by or {})})


@dataclass
class _Block:
    """A stretch of training: its steps, and (layers, tasks, tasks) counts, the upper triangles used."""

    steps: int
    conflicts: Tensor
    observed: Tensor

    @classmethod
    def empty(cls, layers: int, tasks: int, device: torch.device) -> _Block:
        shape = (layers, tasks, tasks)
        return cls(0, *(torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2)))

    def add(self, other: _Block) -> _Block:
        return _Block(self.steps + other.steps, self.conflicts + other.conflicts, self.observed + other.observed)

    def grow(self, tasks: int) -> None:
        pad = tasks - self.conflicts.shape[1]
        self.conflicts = nn.functional.pad(self.conflicts, (0, pad, 0, pad))
        self.observed = nn.functional.pad(self.observed, (0, pad, 0, pad))
