"""Metrics of tasks that predict a value for every pixel, each over all known pixels of the whole test set.

The published tables average each batch's metric over the batches, which gives more weight to the pixels of images that
have few known ones. Counting over all pixels does not depend on the size of a batch.
"""

from __future__ import annotations

from recon.problems.problem import Metric
from recon.problems.tasks.metrics import TORCHMETRICS, late

_STATES = "recon.problems.tasks.dense_states"


def mean_iou(classes: int, ignore: int) -> Metric:
    """Intersection over union of each class's pixels, averaged over the classes that are in the data or predicted.

    Logits `(N, classes, H, W)` against labels `(N, H, W)`; `ignore` labels pixels that do not count.
    """
    options = {"average": "macro", "ignore_index": ignore, "validate_args": False}
    return Metric("mean_iou", late(TORCHMETRICS, "MulticlassJaccardIndex", classes, **options))


def pixel_accuracy(classes: int, ignore: int) -> Metric:
    """The share of pixels whose largest logit is their class's; see `mean_iou`."""
    options = {"average": "micro", "ignore_index": ignore, "validate_args": False}
    return Metric("pixel_accuracy", late(TORCHMETRICS, "MulticlassAccuracy", classes, **options))


def absolute_error() -> Metric:
    """Mean of |output - target|: `(N, 1, H, W)` each, the target 0 where it is not known."""
    return Metric("absolute_error", late(_STATES, "AbsoluteError"), higher_is_better=False)


def relative_error() -> Metric:
    """Mean of |output - target| / |target|; see `absolute_error`."""
    return Metric("relative_error", late(_STATES, "RelativeError"), higher_is_better=False)


def mean_angle() -> Metric:
    """Mean angle between output and target, in degrees: `(N, 3, H, W)` each, the target 0 where it is not known."""
    return Metric("mean_angle", late(_STATES, "MeanAngle"), higher_is_better=False)


def median_angle() -> Metric:
    """Median of the angles, to the nearest 0.01 degrees; see `mean_angle`."""
    return Metric("median_angle", late(_STATES, "MedianAngle"), higher_is_better=False)


def within(degrees: float) -> Metric:
    """The share of angles below so many degrees; see `mean_angle`."""
    return Metric(f"within_{degrees:g}", late(_STATES, "AnglesWithin", degrees))
