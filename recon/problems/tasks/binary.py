"""Yes-or-no tasks whose labels may be missing: targets are `(N,)` floats, 1, 0 or NaN; outputs are logits `(N, 1)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recon.problems.loading import TensorBatches
from recon.problems.problem import Metric, Task

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState


def binary_task(name: str, *metrics: Metric) -> Task:
    """A task with the cross-entropy over the labelled samples as its loss."""
    return Task(name, binary_cross_entropy, metrics)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the samples with a label (logits `(N, 1)`, targets `(N,)`: 1, 0 or NaN); NaN where none has one."""
    # Weights, not an index: with an index, the CPU would wait at every step to learn how many rows it picks on the GPU.
    labelled = (~target.isnan()).to(output.dtype)
    losses = F.binary_cross_entropy_with_logits(
        output.squeeze(1), target.nan_to_num().to(output.dtype), weight=labelled, reduction="sum"
    )
    return losses / labelled.sum()


def auc() -> Metric:
    """The area under the ROC curve over the labelled samples."""
    return Metric("auc", partial(_on_labelled, "BinaryAUROC"))


def accuracy() -> Metric:
    """The share of the labelled samples whose logit has the right sign."""
    return Metric("accuracy", partial(_on_labelled, "BinaryAccuracy"))


def _on_labelled(name: str) -> MetricState:
    """Torchmetrics' metric of this name, of the samples that have a label."""
    from torchmetrics import classification

    class OnLabelled(getattr(classification, name)):  # type: ignore[misc]
        def update(self, output: Tensor, target: Tensor) -> None:
            """Count logits `(N, 1)` and targets `(N,)`."""
            labelled = ~target.isnan()
            # Torchmetrics would mistake logits that lie between 0 and 1 for probabilities. In double precision, because
            # float32 makes 1 of all large logits, whose order would then be lost.
            super().update(output.squeeze(1)[labelled].double().sigmoid(), target[labelled].long())

    return OnLabelled()


class LabelledBatches(TensorBatches):
    """Batches that leave out the tasks for which none of their samples has a label.

    `recon.train`, `recon.profile` and `recon.evaluate` skip what a batch has no target for.
    """

    def __init__(
        self, inputs: Tensor, targets: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(inputs, targets, transform)
        # Known beforehand: asking the GPU at every step whether there is a label would make the CPU wait.
        self._labelled = torch.stack([~target.isnan() for target in targets.values()], dim=1).cpu()

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = super().__getitem__(indices)
        labelled = self._labelled[indices].any(dim=0).tolist()
        return inputs, {task: target for (task, target), one in zip(targets.items(), labelled, strict=True) if one}
