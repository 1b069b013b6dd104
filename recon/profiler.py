"""Profiler: counts, while a model trains, how often the tasks' gradients conflict in each shared layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recon.conflict_map import ConflictMap, Counts, LayerConflicts, threshold_bin
from recon.errors import GradientError, UsageError
from recon.gradients import TaskJacobian, layer_gramians
from recon.layers import find_layers
from recon.methods import Method
from recon.problem import Batch, Loss
from recon.tally import Tally
from recon.trainer import Epoch, train
from recon.updates import backward


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
        self._tally: Tally | None = None
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
        layers, gramians = layer_gramians(jacobian, self._layer_of)
        # A step in which nothing is shared has no gradients whose device could be taken.
        device = self.parameters[0].device
        if self._tally is None:
            self._tally = Tally(len(self.layers), self.threshold, device)
        self._shared.update(layers)
        self._tasks += [task for task in jacobian.tasks if task not in self._tasks]
        self._tally.add(layers, [self._tasks.index(task) for task in jacobian.tasks], gramians.to(device))

    def conflict_map(self, made_by: Mapping[str, Any] | None = None) -> ConflictMap:
        """What has been counted so far.

        Args:
            made_by: how the map was made, to be kept in its file.

        Raises:
            UsageError: nothing was recorded, or no layer is shared.
            GradientError: no step had finite gradients.
        """
        tally = self._tally
        if tally is None:
            raise UsageError("Nothing was profiled yet: call profiler.backward(losses) in the training loop first.")
        if not self._shared:
            raise UsageError(
                f"No layer is shared: in none of {tally.steps} steps did the losses of two tasks depend on the same "
                "trainable layer. A batch needs the targets of two tasks or more, and the tasks a common backbone."
            )
        if tally.skipped == tally.steps:
            raise GradientError(
                f"The gradients of all {tally.steps} steps were infinite or NaN, so nothing could be counted. Lower "
                "the learning rate, or look at the losses."
            )
        conflicts, observed, stage_steps = tally.by_stage(len(self._tasks))
        return ConflictMap(
            tasks=tuple(self._tasks),
            threshold=self.threshold,
            steps=tally.steps,
            skipped=tally.skipped,
            stage_steps=tuple(stage_steps),
            layers=self._layer_conflicts(tally.histogram.numpy(), conflicts.numpy(), observed.numpy()),
            made_by=dict(made_by or {}),
        )

    def _layer_conflicts(self, histogram: Counts, conflicts: Counts, observed: Counts) -> list[LayerConflicts]:
        i, j = np.triu_indices(len(self._tasks), k=1)
        return [
            LayerConflicts(
                name=self.layers[k].name,
                kind=self.layers[k].kind,
                shapes=self.layers[k].shapes,
                histogram=histogram[k],
                conflicts=conflicts[:, k][:, i, j],
                observed=observed[:, k][:, i, j],
            )
            for k in sorted(self._shared)
        ]


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
