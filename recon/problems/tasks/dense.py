"""Tasks that predict a value for every pixel: their losses, and how their targets are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from recon.problems.loading import TensorBatches
from recon.problems.options import check_available
from recon.problems.problem import Task
from recon.problems.tasks import dense_metrics as metrics

IGNORE = 255
"""The label of pixels that belong to no class."""


def segmentation(name: str, classes: int) -> Task:
    """A class for every pixel: logits `(N, classes, H, W)` against `(N, H, W)`, `IGNORE` where there is none."""
    return Task(name, segmentation_loss, [metrics.mean_iou(classes, IGNORE), metrics.pixel_accuracy(classes, IGNORE)])


def depth(name: str) -> Task:
    """A positive number for every pixel: `(N, 1, H, W)` against the same, 0 where it is not known."""
    return Task(name, depth_loss, [metrics.absolute_error(), metrics.relative_error()])


def normals(name: str) -> Task:
    """A direction for every pixel: `(N, 3, H, W)`, of any length, against unit vectors, 0 where it is not known."""
    angles = [metrics.mean_angle(), metrics.median_angle(), *map(metrics.within, (11.25, 22.5, 30))]
    return Task(name, normals_loss, angles)


# The losses of Liu, Johns and Davison (CVPR 2019), section 4.1: means over the pixels whose target is known. A batch
# without such pixels has the loss 0.


def segmentation_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy."""
    total = F.cross_entropy(output, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def depth_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error."""
    return _masked_mean((output - target).abs(), target != 0)


def normals_loss(output: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine of the angle between output and target."""
    return _masked_mean(1 - F.cosine_similarity(output, target, dim=1), target.any(dim=1))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


# The data. They are read once and stay in memory as bytes and half floats, 2.4 GB for the largest of these data sets:
# reading many small files for every batch would take longer than a training step.


def batches(images: np.ndarray, targets: Mapping[str, np.ndarray]) -> TensorBatches:
    """Batches of `(N, 3, H, W)` images from 0 to 1, bytes or floats, and of float32 targets or int64 labels."""
    tensors = {task: torch.from_numpy(target) for task, target in targets.items()}
    return TensorBatches(torch.from_numpy(images), tensors, _unit_interval, _unpacked)


def _unit_interval(images: Tensor) -> Tensor:
    return images.float() if images.is_floating_point() else images.float() / 255


def _unpacked(target: Tensor) -> Tensor:
    return target.float() if target.is_floating_point() else target.long()


def chosen(name: str, available: int, train_samples: int | None) -> np.ndarray:
    """The indices of `train_samples` samples, spread over all: neighbours often show the same place."""
    check_available(name, available, train_samples)
    # RandomState: its stream is frozen across numpy's versions (NEP 19).
    return np.random.RandomState(0).permutation(available)[:train_samples]


def halved_at_half_time(optimizer: Optimizer, steps: int) -> MultiStepLR:
    """The learning rate falls to a half after 100 of 200 epochs."""
    return MultiStepLR(optimizer, [math.ceil(steps / 2)], gamma=0.5)
