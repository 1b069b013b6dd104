"""Two conflict maps side by side: do they rank the layers alike?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from recon.errors import MapMismatchError, UsageError, shortened
from recon.maps.measures import By
from recon.maps.names import rename_hint, renamed
from recon.maps.score_table import ScoreTable


@dataclass(frozen=True)
class LayerRanks:
    """A layer in two maps.

    Args:
        ranks: in either map among the layers that both have, 1 the highest score; layers with equal scores share the
            mean of their ranks.
        scores: its score in either map: by count a whole number, by rate and by excess a share.
        shares: its score in either map as a share of what was seen there; NaN where that is unknown.
    """

    name: str
    ranks: tuple[float, float]
    scores: tuple[float, float]
    shares: tuple[float, float]

    @property
    def shift(self) -> float:
        """How many ranks the layer lies lower in the second map."""
        return self.ranks[1] - self.ranks[0]


@dataclass(frozen=True)
class MapComparison:
    """How far two conflict maps agree on the order of the layers that both have.

    Args:
        layers: the layers of both maps, the first map's highest score first.
        only: the layers of the first map alone, and of the second alone.
        spearman: rank correlation ρ; NaN with fewer than two layers, or where all scores of a map are equal.
        kendall: rank correlation τ-b, which counts the pairs of layers in the same order; NaN likewise.
        mean_shift: mean |Δrank|.
        top_k: the K of the overlap.
        overlap: the layers among the first K of both maps.
        regrouped: the layers that are units of other layers in the second map.
    """

    layers: list[LayerRanks]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    spearman: float
    kendall: float
    mean_shift: float
    top_k: int
    overlap: tuple[str, ...]
    regrouped: tuple[str, ...] = ()

    @property
    def jaccard(self) -> float:
        """The overlap as a share of all layers among the first K of either map."""
        return len(self.overlap) / (2 * self.top_k - len(self.overlap))


def compare(
    first: ScoreTable,
    second: ScoreTable,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    rename: Mapping[str, str] | None = None,
    tasks: Sequence[str] | None = None,
    by: By = "count",
) -> MapComparison:
    """See `ConflictMap.compare`."""
    second = renamed(second, rename)
    scores = [cmap.scores(threshold, tasks, by) for cmap in (first, second)]
    shares = [cmap.shares(threshold, tasks, by) for cmap in (first, second)]
    common = [name for name in scores[0] if name in scores[1]]
    if not common:
        raise _nothing_in_common(list(scores[0]), list(scores[1]))
    top_k = max(1, len(common) // 4) if top_k is None else top_k
    if not 1 <= top_k <= len(common):
        raise UsageError(
            f"top_k is {top_k}, but the maps have {len(common)} layers in common. Choose between 1 and {len(common)}."
        )
    # Both in the first map's order, so that ties fall alike on either side.
    values = [np.array([of[name] for name in common]) for of in scores]
    orders = [np.argsort(-value, kind="stable") for value in values]
    ranks = [stats.rankdata(-value, method="average") for value in values]
    top = [{common[i] for i in order[:top_k]} for order in orders]
    layers = [
        LayerRanks(
            name=common[i],
            ranks=(float(ranks[0][i]), float(ranks[1][i])),
            scores=(scores[0][common[i]], scores[1][common[i]]),
            shares=(shares[0][common[i]], shares[1][common[i]]),
        )
        for i in orders[0]
    ]
    spearman, kendall = _correlations(values)
    return MapComparison(
        layers=layers,
        only=(
            tuple(name for name in scores[0] if name not in scores[1]),
            tuple(name for name in scores[1] if name not in scores[0]),
        ),
        spearman=spearman,
        kendall=kendall,
        mean_shift=float(np.mean([abs(layer.shift) for layer in layers])),
        top_k=top_k,
        overlap=tuple(layer.name for layer in layers if layer.name in top[0] & top[1]),
        regrouped=_regrouped(first, second),
    )


def _regrouped(first: ScoreTable, second: ScoreTable) -> tuple[str, ...]:
    members = {layer.name: layer.members for layer in second.layers}
    return tuple(layer.name for layer in first.layers if members.get(layer.name, layer.members) != layer.members)


def _correlations(values: Sequence[np.ndarray]) -> tuple[float, float]:
    if len(values[0]) < 2:
        return float("nan"), float("nan")
    with warnings.catch_warnings():  # of constant input, for which NaN says enough
        warnings.simplefilter("ignore")
        return float(stats.spearmanr(*values).statistic), float(stats.kendalltau(*values).statistic)


def _nothing_in_common(first: Sequence[str], second: Sequence[str]) -> MapMismatchError:
    # The second map's layers are the ones that a rename changes.
    hint = rename_hint(second, first) or "They were made on different architectures."
    return MapMismatchError(
        f"The maps have no layer in common: the first has {shortened(first)}; the second has {shortened(second)}. "
        f"{hint}"
    )
