"""Make a conflict map from what a profiler has counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recon.errors import GradientError, UsageError
from recon.maps import ConflictMap, LayerConflicts, LayerFloor
from recon.maps.counts import Counts, pair_bin_steps
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
    by_pair = _PairSeries.of(tally, sorted(shared), len(tasks))
    below, floor = tally.below(len(tasks)), tally.floor(len(tasks)).numpy()
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
                below=None if below is None else below.numpy()[:, number][:, i, j].astype(np.int64),
                pair_series=by_pair.conflicts.get(number),
                members=layer.members,
                floor=_floor(floor[number]),
            )
            for number, layer in shared.items()
        ],
        made_by=dict(made_by),
        bin_steps=bin_steps,
        thresholds=tally.thresholds,
        pair_bin_steps=by_pair.bin_steps,
        met=by_pair.met,
    )


@dataclass(frozen=True)
class _PairSeries:
    """Conflicts by pair over time, in as many bins of steps as a file of a few MB has room for.

    Args:
        conflicts: `{layer: (bins, pairs)}`; empty where there is no room for enough bins.
        met: (bins, pairs) in how many steps a pair met, in the layer where it did most often.
        bin_steps: the steps of a bin.
    """

    conflicts: Mapping[int, Counts]
    met: Counts | None
    bin_steps: int

    @classmethod
    def of(cls, tally: Tally, layers: Sequence[int], tasks: int) -> _PairSeries:
        blocks, block_steps = tally.pair_series(tasks)
        i, j = np.triu_indices(tasks, k=1)
        bin_steps = pair_bin_steps(tally.steps, len(layers), len(i))
        if bin_steps == 0:
            return cls({}, None, 0)
        counts = blocks[:, list(layers)][..., i, j].numpy()  # (blocks, layers, 2, pairs)
        counts = np.add.reduceat(counts, np.arange(0, len(counts), bin_steps // block_steps), dtype=np.int64)
        return cls(
            dict(zip(layers, counts[:, :, 0].swapaxes(0, 1), strict=True)), counts[:, :, 1].max(axis=1), bin_steps
        )


def _floor(counts: Counts) -> LayerFloor | None:
    """Of a layer's (1 + thresholds, T, T) counts; None without any."""
    if not counts[0].any():
        return None
    i, j = np.triu_indices(counts.shape[-1], k=1)
    own, across = counts.diagonal(axis1=1, axis2=2), counts[:, i, j]
    return LayerFloor(own[0], own[1:], across[0], across[1:])
