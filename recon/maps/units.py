"""Units made of layers that were profiled one by one: their counts added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recon.maps.counts import LayerConflicts, LayerFloor
from recon.support.network.layer_choice import unit_kind


def added_up(name: str, layers: Sequence[LayerConflicts]) -> LayerConflicts:
    """Several layers of a map as one unit, which holds the conflicts of all of them.

    Its score by count is the sum of theirs, and its rates are means over them. (The cosines between the gradients of
    the whole are not known from those of the parts: profile with `units` for them.) What one of the layers does not
    have, the unit has not.
    """
    kinds = [kind for layer in layers for kind in ["layers"] * len(layer.members) or [layer.kind]]
    return LayerConflicts(
        name=name,
        kind=unit_kind(kinds),
        shapes={f"{layer.name}.{key}": shape for layer in layers for key, shape in layer.shapes.items()},
        members=tuple(member for layer in layers for member in layer.members or (layer.name,)),
        floor=_floors([layer.floor for layer in layers]),
        **{field: _total([getattr(layer, field) for layer in layers]) for field in _COUNTS},
    )


_COUNTS = ("histogram", "conflicts", "observed", "series", "score", "below", "pair_series")


def _floors(floors: Sequence[LayerFloor | None]) -> LayerFloor | None:
    known = [floor for floor in floors if floor is not None]
    if len(known) < len(floors):
        return None
    return LayerFloor(**{field: _total([getattr(floor, field) for floor in known]) for field in vars(known[0])})


def _total(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else sum(values[1:], values[0])
