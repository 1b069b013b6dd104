"""How metrics are made, and one that several problems share: accuracy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recon.problems.problem import Metric

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState

TORCHMETRICS = "torchmetrics.classification"


def late(module: str, name: str, *args: Any, **options: Any) -> Callable[[], MetricState]:
    """Makes a class's metrics; its module is imported for the first: torchmetrics takes longer than torch."""
    return lambda: getattr(importlib.import_module(module), name)(*args, **options)


def accuracy(classes: int) -> Metric:
    """The share of samples whose largest logit is their class's: `(N, classes)` against `(N,)`."""
    return Metric("accuracy", late(TORCHMETRICS, "MulticlassAccuracy", classes, average="micro"))
