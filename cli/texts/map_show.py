"""What `recon map show` prints, and `recon profile` of its map: how it was made, and the layers by rank."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recon.errors import UsageError, cut, printable
from recon.support.tables import text_table

if TYPE_CHECKING:
    from recon import ConflictMap

_SURE = 0.95  # a probability of being in the top K, or of not: anything less is within noise of the cut


def header_text(cmap: ConflictMap) -> str:
    """How a map was made, in a few lines."""
    made_by = ", ".join(f"{key} {made_by_text(value)}" for key, value in cmap.made_by.items()) or "unknown"
    steps = "unknown" if cmap.steps is None else f"{cmap.steps}, of which {cmap.skipped} skipped as not finite"
    lines = [
        f"tasks:     {cut(printable(', '.join(cmap.tasks), keep=''), 2000) or 'unknown'}",
        f"steps:     {steps}",
        f"threshold: {cmap.threshold:g}",
        textwrap.fill(cut(made_by, 2000), 100, initial_indent="made by:   ", subsequent_indent=" " * 11),
    ]
    return "\n".join([*lines, cmap.unfinished] if cmap.unfinished else lines)


def ranked_layers(
    cmap: ConflictMap, threshold: float | None = None, *, top_k: int | None = None
) -> list[dict[str, Any]]:
    """The shared layers, highest score first, each with what the map knows of it.

    At the map's own threshold, and if the map knows its scores over time, a layer has an `interval` that holds the
    score in 90 % of resampled runs, and with `top_k` a `top_k_probability`: of being among the top K.
    """
    if top_k is not None and not 1 <= top_k <= len(cmap.layers):
        raise UsageError(
            f"There is no top {top_k} of {len(cmap.layers)} shared layers: choose 1 to {len(cmap.layers)}."
        )
    scores, shares = cmap.scores(threshold), cmap.shares(threshold)
    quarters = dict(zip(scores, cmap.stage_shares().tolist(), strict=True))
    layers = {layer.name: layer for layer in cmap.layers}
    confidence = _confidence(cmap, threshold, top_k)
    return [
        {
            "rank": rank,
            "name": name,
            "type": layers[name].kind,
            "parameters": layers[name].size,
            "score": scores[name],
            "share": shares[name],
            "quarters": quarters[name],
            **confidence.get(name, {}),
            **({"members": layers[name].members} if layers[name].members else {}),
        }
        for rank, name in enumerate(cmap.ranking(threshold), start=1)
    ]


def _confidence(cmap: ConflictMap, threshold: float | None, top_k: int | None) -> dict[str, dict[str, Any]]:
    """What resampling says of each layer; nothing if the map cannot be resampled."""
    if not cmap.has_series or threshold not in (None, cmap.threshold):
        return {}
    found: dict[str, dict[str, Any]] = {name: {"interval": list(ends)} for name, ends in cmap.intervals().items()}
    if top_k is not None:
        for name, probability in cmap.top_k_probability(top_k).items():
            found[name]["top_k_probability"] = round(probability, 3)
    return found


def unsure_why(cmap: ConflictMap, threshold: float | None = None) -> str:
    """Why `ranked_layers` does not say how sure the ranking is; empty if it does."""
    if threshold not in (None, cmap.threshold):
        return (
            f"No intervals: the map keeps its scores over time only at its own S={cmap.threshold:g}. To see how sure "
            f"the ranking is at {threshold:g}, profile with --threshold {threshold:g}."
        )
    if cmap.has_series:
        return ""
    if cmap.steps == 1:
        return "No intervals: one step does not show how sure the ranking is. Profile more steps."
    return "No intervals: merged and imported maps do not keep the scores over time that intervals come from."


def ranking_table(
    layers: list[dict[str, Any]], top: int | None = None, quarters: bool = False, top_k: int | None = None
) -> str:
    """A ranking's first layers as text: a line under the first `top_k`, and which layers are within noise of it."""
    shown = layers[:top]
    columns = [
        ("rank", [str(layer["rank"]) for layer in shown]),
        ("layer", [layer["name"] for layer in shown]),
        ("type", [layer["type"] or "-" for layer in shown]),
        ("parameters", [_number(layer["parameters"]) for layer in shown]),
        ("score", [str(layer["score"]) for layer in shown]),
    ]
    if any("interval" in layer for layer in shown):
        columns.append(("90% interval", ["-".join(map(str, layer["interval"])) for layer in shown]))
    knows_cut = top_k is not None and all("top_k_probability" in layer for layer in layers)
    if knows_cut:
        columns.append((f"in top {top_k}", [_probability(layer) for layer in shown]))
    columns.append(("share", [_percent(layer["share"]) for layer in shown]))
    if quarters:
        columns += [(f"q{i + 1}", [_percent(layer["quarters"][i]) for layer in shown]) for i in range(4)]
    header, cells = zip(*columns, strict=True)
    lines = text_table(header, list(zip(*cells, strict=True)), left=3).splitlines()
    if top_k is not None and top_k <= len(shown) and top_k < len(layers):
        lines.insert(2 + top_k, lines[1])
    if len(shown) < len(layers):
        lines.append(f"... and {len(layers) - len(shown)} more")
    text = "\n".join(lines)
    return f"{text}\n{_noise_at_cut(layers, top_k)}" if knows_cut else text


def _noise_at_cut(layers: list[dict[str, Any]], top_k: int | None) -> str:
    names = [layer["name"] for layer in layers if _is_unsure(layer)]
    if not names:
        return f"No layer is within noise of the cut at K={top_k}."
    return textwrap.fill(f"Within noise of the cut at K={top_k} (~): {', '.join(names)}.", 100, break_on_hyphens=False)


def _is_unsure(layer: dict[str, Any]) -> bool:
    return 1 - _SURE < layer["top_k_probability"] < _SURE


def _probability(layer: dict[str, Any]) -> str:
    return ("~ " if _is_unsure(layer) else "") + f"{100 * layer['top_k_probability']:.0f}%"


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share == share else "-"


def made_by_text(value: Any) -> str:
    """An entry of `made_by`; a merged map has a list there that says how each source was made."""
    if isinstance(value, dict):
        return " ".join([str(value.get("map", "")), _details(value)]).strip()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(made_by_text(entry) for entry in value)
    return str(value)


def _details(value: dict[str, Any]) -> str:
    rest = ", ".join(f"{key} {made_by_text(entry)}" for key, entry in value.items() if key != "map")
    return f"({rest})" if rest else ""
