"""PairRates: who fights whom, in one layer or over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recon.errors import UnknownNameError
from recon.maps.score_table import ScoreTable

Pair = tuple[str, str]


@dataclass(frozen=True)
class PairRates:
    """How often each pair of some tasks conflicted.

    Args:
        tasks: the tasks.
        met: `{pair: in how many steps it met}`, in the layer where it did most often.
        rates: `{pair: the share of them in which it conflicted}`, over the layers; without pairs that never met.
        own: `{task: the share of the floor steps in which it conflicted with itself}`; empty without a noise floor.
    """

    tasks: tuple[str, ...]
    met: Mapping[Pair, int]
    rates: Mapping[Pair, float]
    own: Mapping[str, float]


def pair_rates(
    cmap: ScoreTable,
    layers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    threshold: float | None = None,
) -> PairRates:
    """The conflicts of each pair of `tasks` in `layers`, both all of the map's when not given.

    Raises:
        UnknownNameError: the map has no such layer or task.
        UsageError: the map holds no counts by pair, or none at this threshold.
    """
    names = [layer.name for layer in cmap.layers]
    for name in layers or ():
        if name not in names:
            raise UnknownNameError("layer in this map", name, names)
    rows = [number for number, name in enumerate(names) if layers is None or name in layers]
    chosen = cmap.pairs_among(tasks)
    conflicts = cmap.pair_conflicts(threshold)[rows][:, chosen]
    observed = cmap.pair_observations()[rows][:, chosen]
    pairs = [cmap.pairs[place] for place in chosen]
    shares = conflicts.sum(axis=0) / observed.sum(axis=0).clip(min=1)
    met = dict(zip(pairs, observed.max(axis=0).tolist(), strict=True))
    own = _own_rates(cmap, rows, threshold)
    among = tuple(tasks or cmap.tasks)
    return PairRates(
        among,
        met,
        {pair: share for pair, share in zip(pairs, shares.tolist(), strict=True) if met[pair]},
        {task: own[task] for task in among if task in own},
    )


def _own_rates(cmap: ScoreTable, rows: Sequence[int], threshold: float | None) -> dict[str, float]:
    if not cmap.has_floor:
        return {}
    place = cmap.floor_place(threshold)
    floors = [floor for row in rows if (floor := cmap.layers[row].floor) is not None]
    conflicts = sum(floor.conflicts[place] for floor in floors)
    observed = sum(floor.observed for floor in floors)
    if not floors:
        return {}
    found = zip(cmap.tasks, conflicts.tolist(), observed.tolist(), strict=True)  # type: ignore[union-attr]
    return {task: count / seen for task, count, seen in found if seen}
