"""Applying a conflict map to a model: which of its layers are there, and which have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from torch import nn

from recon.errors import MapMismatchError, shortened
from recon.maps import ConflictMap, LayerConflicts
from recon.maps.names import rename_hint, renamed
from recon.maps.units import added_up
from recon.support.network.layer_choice import Patterns, choose_names, join_names, joined_layer
from recon.support.network.layers import Layer, find_layers


@dataclass(frozen=True)
class Match:
    """How a conflict map fits a model.

    A unit of the map, which joins layers, is in the model if all its members are. Plans name the model's own layers:
    `members` leads from one to the other.

    Args:
        cmap: the map of the layers that are in the model, under the model's names and in its order.
        missing: the map's layers, after renaming, that are not in the model.
        changed: the layers in `cmap` whose parameters have other shapes in the model, such as a stem with more input
            channels. They are ranked nevertheless. A map without shapes, such as an imported one, has none of them.
        hint: what to try for the missing layers; may be empty.
    """

    cmap: ConflictMap
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    hint: str

    @property
    def matched(self) -> tuple[str, ...]:
        """The layers of the model that the map scores, in model order."""
        return tuple(layer.name for layer in self.cmap.layers)

    def members(self, name: str) -> tuple[str, ...]:
        """The layers of the model that a name stands for: the members of a unit of the map, or else the name itself."""
        return self.units.get(name, (name,))

    def expand(self, names: Iterable[str]) -> list[str]:
        """The layers of the model that these names stand for, see `members`."""
        return [member for name in names for member in self.members(name)]

    @cached_property
    def units(self) -> dict[str, tuple[str, ...]]:
        """`{unit: the layers of the model that it joins}`, of the map's units."""
        return {layer.name: layer.members for layer in self.cmap.layers if layer.members}

    def warnings(self) -> list[str]:
        """Warnings to read before trusting the map, a sentence or two each."""
        total = len(self.matched) + len(self.missing)
        lines = [self.cmap.unfinished] if self.cmap.unfinished else []
        if self.missing:
            lines.append(
                f"{len(self.missing)} of the map's {total} layers are not in this model ({shortened(self.missing)}); "
                f"the other {len(self.matched)} are ranked without them. {self.hint}".rstrip()
            )
        if self.changed:
            lines.append(
                f"{len(self.changed)} of the {len(self.matched)} matched layers have other parameter shapes in the "
                f"model than in the map ({shortened(self.changed)}); they are ranked all the same."
            )
        return lines


def match(cmap: ConflictMap, model: nn.Module, rename: Mapping[str, str] | None = None) -> Match:
    """Find a map's layers in a model, which may be another one than the map was made on.

    Args:
        cmap: the conflict map.
        model: the unbranched model.
        rename: `{old prefix: new prefix}` of the map's layer names, of whole path components. `{"": "net"}` puts a
            prefix before every name, `{"module": ""}` takes one away.

    Raises:
        MapMismatchError: none of the map's layers is in the model, or two of them are or hold one layer there.
        UnknownNameError: a rename changes no name.
    """
    given, cmap = _paths(cmap), renamed(cmap, rename)
    layers = find_layers(model)
    by_path = {path: layer for layer in layers for path in (layer.name, *layer.aliases)}
    found: dict[str, LayerConflicts] = {}
    taken: dict[str, str] = {}
    missing = []
    for scored in cmap.layers:
        if not all(path in by_path for path in _paths_of(scored)):
            missing.append(scored.name)
            continue
        names = [by_path[path].name for path in _paths_of(scored)]
        ours = replace(scored, members=tuple(names)) if scored.members else replace(scored, name=names[0])
        twice = [name for name in names if name in taken]
        if twice or ours.name in found:
            _refuse_twice(scored.name, twice[0] if twice else ours.name)
        taken |= dict.fromkeys(names, ours.name)
        found[ours.name] = ours
    # In the map's own names, of which a rename given with the hint speaks.
    hint = rename_hint(given, list(by_path)) if missing else ""
    if not found:
        names = [scored.name for scored in cmap.layers]
        none = f"none of its {len(names)} layers is" if len(names) > 1 else "its only layer is not"
        advice = f"{hint} Or profile" if hint else "Profile"
        raise MapMismatchError(
            f"The map was made for another architecture: {none} in this model (the map has "
            f"{shortened(names)}; the model has {shortened(layer.name for layer in layers)}). {advice} this model, or "
            "take the map made for it."
        )
    in_order = dict.fromkeys(taken[layer.name] for layer in layers if layer.name in taken)
    matched = [found[name] for name in in_order]
    changed = [scored.name for scored in matched if scored.shapes and _shapes(scored) != _shapes_in(scored, by_path)]
    return Match(replace(cmap, layers=matched), tuple(missing), tuple(changed), hint)


def narrowed(
    found: Match, layers: Patterns | None = None, exclude: Patterns | None = None, units: Patterns | None = None
) -> Match:
    """The match with some of the map's layers only, and with layers joined into units.

    Args:
        found: a match.
        layers: keep those whose whole name matches one of these regular expressions, or is among these names.
        exclude: leave these out, in the same way.
        units: join what is left, see `recon.support.network.layer_choice.join_names`. A unit that is made here has the
            conflicts of all its layers (`recon.maps.units.added_up`).

    Raises:
        UnknownNameError: an expression matches none of the map's layers.
        UsageError: one is none, nothing is left, or a unit joins nothing or has another's name.
    """
    scored = {layer.name: layer for layer in found.cmap.layers}
    kept = choose_names(dict.fromkeys(scored, ()), layers, exclude)
    joins = {} if units is None else join_names(kept, units, taken=scored)
    unit_of = {
        name: added_up(unit, [scored[name] for name in names]) for unit, names in joins.items() for name in names
    }
    chosen = {layer.name: layer for layer in (unit_of.get(name, scored[name]) for name in kept)}
    changed = [name for name in chosen if set(joins.get(name, [name])) & set(found.changed)]
    return replace(found, cmap=replace(found.cmap, layers=list(chosen.values())), changed=tuple(changed))


def _paths(cmap: ConflictMap) -> list[str]:
    return [path for scored in cmap.layers for path in _paths_of(scored)]


def _paths_of(scored: LayerConflicts) -> tuple[str, ...]:
    """Where the model has what was scored: a layer, or the members of a unit."""
    return scored.members or (scored.name,)


def _refuse_twice(scored: str, name: str) -> NoReturn:
    raise MapMismatchError(
        f"Two of the map's layers, one of them {scored!r}, are the same layer of this model, {name!r}, reached by two "
        "paths. Use a map made on this model: profile it."
    )


def _shapes(scored: LayerConflicts) -> Any:
    """A unit's by place: the names of its parameters begin with paths, which a rename may have changed."""
    return list(scored.shapes.values()) if scored.members else scored.shapes


def _shapes_in(scored: LayerConflicts, by_path: Mapping[str, Layer]) -> Any:
    members = [by_path[path] for path in _paths_of(scored)]
    return list(joined_layer(scored.name, members).shapes.values()) if scored.members else members[0].shapes
