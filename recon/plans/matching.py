"""Applying a conflict map to a model: which of its layers are there, and which have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from recon.errors import MapMismatchError, shortened
from recon.maps import ConflictMap, LayerConflicts
from recon.maps.names import rename_hint, renamed
from recon.support.network.layers import find_layers


@dataclass(frozen=True)
class Match:
    """How a conflict map fits a model.

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
        MapMismatchError: none of the map's layers is in the model, or two of them are one layer there.
        UnknownNameError: a rename changes no name.
    """
    given, cmap = [layer.name for layer in cmap.layers], renamed(cmap, rename)
    layers = find_layers(model)
    by_path = {path: layer for layer in layers for path in (layer.name, *layer.aliases)}
    found: dict[str, LayerConflicts] = {}
    for scored in cmap.layers:
        if scored.name not in by_path:
            continue
        name = by_path[scored.name].name
        if name in found:
            raise MapMismatchError(
                f"Two of the map's layers, one of them {scored.name!r}, are the same layer of this model, {name!r}, "
                "reached by two paths. Use a map made on this model: profile it."
            )
        found[name] = scored
    names = [scored.name for scored in cmap.layers]
    missing = [name for name in names if name not in by_path]
    # In the map's own names, of which a rename given with the hint speaks.
    hint = rename_hint(given, list(by_path)) if missing else ""
    if not found:
        advice = f"{hint} Or profile" if hint else "Profile"
        raise MapMismatchError(
            f"The map was made for another architecture: none of its {len(names)} layers is in this model (the map has "
            f"{shortened(names)}; the model has {shortened(layer.name for layer in layers)}). {advice} this model, or "
            "take the map made for it."
        )
    matched = [replace(found[layer.name], name=layer.name) for layer in layers if layer.name in found]
    changed = [layer.name for layer in matched if layer.shapes and layer.shapes != by_path[layer.name].shapes]
    return Match(replace(cmap, layers=matched), tuple(missing), tuple(changed), hint)
