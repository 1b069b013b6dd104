"""How the cosines between the tasks' gradients are distributed, before and after branching. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from recon.maps import ConflictMap
from recon.maps.counts import Counts, threshold_bin
from recon.problems.paper import DEFAULT_EDGES, DEFAULT_SEVERE, CosineTable
from recon.profiling.conflict_counter import CONFLICTS_FILE, read_cosines
from recon.support.tables import text_table


@dataclass(frozen=True)
class Cosines:
    """What was counted while one variant trained, over all its seeds."""

    title: str
    key: tuple[str, str]  # method and surgery, as the paper's tables know them
    whole: Counts  # (200,): of the whole gradients, over all shared parameters
    layers: Mapping[str, Counts]  # `{shared layer: (200,) cosines}`

    @property
    def conflicts(self) -> dict[str, float]:
        """`{shared layer: share of its cosines below 0}`."""
        return {name: sum(shares(histogram, (0.0,))[1:]) for name, histogram in self.layers.items()}


def read(title: str, key: tuple[str, str], folders: Sequence[Path]) -> Cosines:
    """Add up what the runs in these folders counted."""
    maps = [ConflictMap.load(folder / CONFLICTS_FILE) for folder in folders]
    layers: dict[str, Counts] = {}
    for cmap in maps:
        for layer in cmap.layers:
            assert layer.histogram is not None
            layers[layer.name] = layers.get(layer.name, np.zeros_like(layer.histogram)) + layer.histogram
    return Cosines(title, key, sum((read_cosines(f) for f in folders), np.zeros(200, np.int64)), layers)


def shares(histogram: Counts, edges: Sequence[float]) -> list[float]:
    """The share of the cosines in each bin, from the top one to the one that ends at -1."""
    cuts = [len(histogram), *(threshold_bin(edge) for edge in edges), 0]
    total = max(1, int(histogram.sum()))
    return [int(histogram[low:high].sum()) / total for high, low in pairwise(cuts)]


def reduction(before: Counts, after: Counts, severe: float) -> float | None:
    """By which part branching made the share of cosines below `severe` smaller; None where there were none."""
    cut = threshold_bin(severe)
    was, is_now = (int(counts[:cut].sum()) / max(1, int(counts.sum())) for counts in (before, after))
    return None if was == 0 else 1 - is_now / was


def kept_layers(before: Cosines, after: Cosines) -> list[str]:
    """The layers that are shared in both."""
    return [name for name in before.layers if name in after.layers]


def pooled(cosines: Cosines, names: Sequence[str]) -> Counts:
    """(200,) cosines of all these layers together."""
    return sum((cosines.layers[name] for name in names), np.zeros(200, np.int64))


def bins_of(paper: CosineTable | None) -> tuple[tuple[float, ...], float]:
    """The bins' lower ends, and the cosine below which a conflict is severe."""
    return (DEFAULT_EDGES, DEFAULT_SEVERE) if paper is None else (paper.edges, paper.severe)


def whole_table(variants: Sequence[Cosines], paper: CosineTable | None) -> str:
    """The distribution of the whole gradients' cosines by variant, joint training first; the paper's in brackets."""
    edges, severe = bins_of(paper)
    theirs = {} if paper is None else paper.shares
    joint, rows = variants[0], []
    for variant in variants:
        ours, paper_s = shares(variant.whole, edges), theirs.get(variant.key)
        cells = [
            _percent(share) + ("" if paper_s is None else f" ({paper_s[number]:.2f})")
            for number, share in enumerate(ours)
        ]
        fewer = "-" if variant is joint else _percent(reduction(joint.whole, variant.whole, severe), 1)
        if variant is not joint and paper_s is not None and joint.key in theirs:
            cut = edges.index(severe) + 1
            fewer += f" ({100 * (1 - sum(paper_s[cut:]) / sum(theirs[joint.key][cut:])):.1f})"
        rows.append([variant.title, *cells, fewer])
    return text_table(["cosine", *_titles(edges), f"fewer below {severe:g}, %"], rows)


def layers_table(before: Cosines, after: Cosines, paper: CosineTable | None) -> str:
    """The distribution of the cosines of all layers that stay shared together, in two variants."""
    edges, severe = bins_of(paper)
    names = kept_layers(before, after)
    was, is_now = (pooled(cosines, names) for cosines in (before, after))
    cuts = list(dict.fromkeys((0.0, severe)))
    rows = [
        [before.title, *map(_percent, shares(was, edges)), *("-" for _ in cuts)],
        [
            after.title,
            *map(_percent, shares(is_now, edges)),
            *(_percent(reduction(was, is_now, cut), 1) for cut in cuts),
        ],
    ]
    return text_table(["cosine", *_titles(edges), *(f"fewer below {cut:g}, %" for cut in cuts)], rows)


def data(variants: Sequence[Cosines], paper: CosineTable | None) -> dict[str, Any]:
    """As plain values."""
    edges, severe = bins_of(paper)
    return {
        "edges": list(edges),
        "severe": severe,
        "whole": {variant.title: shares(variant.whole, edges) for variant in variants},
        "reduction": {v.title: reduction(variants[0].whole, v.whole, severe) for v in variants[1:]},
        "paper": None if paper is None else {"table": paper.number, "shares": _named(paper)},
    }


def _named(paper: CosineTable) -> dict[str, list[float]]:
    return {" + ".join(filter(None, key)): [share / 100 for share in values] for key, values in paper.shares.items()}


def _titles(edges: Sequence[float]) -> list[str]:
    return [f"{low:g} to {high:g}" for high, low in pairwise([1.0, *edges, -1.0])]


def _percent(part: float | None, digits: int = 2) -> str:
    return "-" if part is None else f"{100 * part:.{digits}f}"
