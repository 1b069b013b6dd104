"""Metrics that several problems have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.problems.problem import Metric

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState


def accuracy(classes: int) -> Metric:
    """The share of samples whose largest logit is their class's: `(N, classes)` against `(N,)`."""

    def make() -> MetricState:
        from torchmetrics.classification import MulticlassAccuracy

        return MulticlassAccuracy(classes, average="micro")

    return Metric("accuracy", make)
