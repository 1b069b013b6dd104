"""Make a conflict map from what a profiler has counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recon.errors import GradientError, UsageError
from recon.maps import ConflictMap, LayerConflicts
from recon.profiling.tally import Tally
from recon.support.network.layers import Layer


def counted_map(
    tally: Tally, shared: Mapping[int, Layer], tasks: Sequence[str], made_by: Mapping[str, Any]
) -> ConflictMap:
    """The map of the shared layers, by their numbers in the tally."""
    if tally.skipped == tally.steps:
        raise GradientError(
            f"The gradients of all {tally.steps} steps were infinite or NaN, so nothing could be counted. Lower "
            "the learning rate, or look at the losses."
        )
    if not shared:
        raise UsageError(
            f"No layer is shared: in none of {tally.steps} steps did the losses of two tasks depend on the same "
            "trainable layer. Give each batch the targets of two or more tasks, and the tasks a common backbone."
        )
    histogram = tally.histogram.numpy()
    conflicts, observed, stage_steps = tally.by_stage(len(tasks))
    series, bin_steps = tally.series()
    i, j = np.triu_indices(len(tasks), k=1)
    return ConflictMap(
        tasks=tuple(tasks),
        threshold=tally.threshold,
        steps=tally.steps,
        skipped=tally.skipped,
        stage_steps=tuple(stage_steps),
        layers=[
            LayerConflicts(
                name=layer.name,
                kind=layer.kind,
                shapes=layer.shapes,
                histogram=histogram[number],
                conflicts=conflicts.numpy()[:, number][:, i, j],
                observed=observed.numpy()[:, number][:, i, j],
                series=series.numpy().astype(np.int64)[:, number],
                members=layer.members,
            )
            for number, layer in shared.items()
        ],
        made_by=dict(made_by),
        bin_steps=bin_steps,
    )
