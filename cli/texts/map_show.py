"""What `recon map show` prints, and `recon profile` of its map: how it was made, and the layers by rank."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from recon.errors import UsageError, cut, printable
from recon.support.tables import counted, text_table
from recon_cli.texts.evidence import score_text

if TYPE_CHECKING:
    from recon import ConflictMap
    from recon.maps.measures import By

FLOOR = (
    "floor: how often a task conflicts with itself on two batches at the same weights, the mean over the tasks; "
    "excess: each pair's rate less the larger floor of its two tasks, at least 0, the mean over the pairs."
)
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
    cmap: ConflictMap,
    threshold: float | None = None,
    *,
    top_k: int | None = None,
    tasks: Sequence[str] | None = None,
    by: By = "count",
) -> list[dict[str, Any]]:
    """The shared layers, highest score first, each with what the map knows of it.

    At the map's own threshold, and if the map knows its scores over time, a layer has an `interval` that holds the
    score in 90 % of resampled runs, and with `top_k` a `top_k_probability`: of being among the top K. Where the map
    holds counts by pair, a layer has its `rate`, and where it holds a noise floor, `floor` and `excess`.
    """
    if top_k is not None and not 1 <= top_k <= len(cmap.layers):
        raise UsageError(
            f"There is no top {top_k} of {counted(len(cmap.layers), 'shared layer')}: choose 1 to {len(cmap.layers)}."
        )
    scores, shares = cmap.scores(threshold, tasks, by), cmap.shares(threshold, tasks, by)
    quarters = dict(zip(scores, cmap.stage_shares(tasks).tolist(), strict=True))
    layers = {layer.name: layer for layer in cmap.layers}
    confidence, others = _confidence(cmap, threshold, top_k, tasks, by), _others(cmap, threshold, tasks)
    return [
        {
            "rank": rank,
            "name": name,
            "type": layers[name].kind,
            "parameters": layers[name].size,
            "score": scores[name],
            "share": shares[name],
            **{what: values[name] for what, values in others.items()},
            "quarters": quarters[name],
            **confidence.get(name, {}),
            **({"members": layers[name].members} if layers[name].members else {}),
        }
        for rank, name in enumerate(cmap.ranking(threshold, tasks, by), start=1)
    ]


def _others(
    cmap: ConflictMap, threshold: float | None, tasks: Sequence[str] | None
) -> dict[str, dict[str, float | None]]:
    """What else the map knows at this threshold: `{rate, floor, excess: {layer: share}}`; None where unknown."""
    found: dict[str, dict[str, float | None]] = {}
    with suppress(UsageError):  # no counts by pair, or none at this threshold
        found["rate"] = {**cmap.scores(threshold, tasks, "rate")}
        floors = cmap.floor(threshold)
        own = {name: [of[task] for task in tasks or cmap.tasks if task in of] for name, of in floors.items()}
        found["floor"] = {name: sum(of) / len(of) if of else None for name, of in own.items()}
        found["excess"] = {**cmap.scores(threshold, tasks, "excess")}
    return found


def _confidence(
    cmap: ConflictMap, threshold: float | None, top_k: int | None, tasks: Sequence[str] | None, by: By
) -> dict[str, dict[str, Any]]:
    """What resampling says of each layer; nothing if the map cannot be resampled."""
    if threshold not in (None, cmap.threshold) or not _knows_noise(cmap, tasks, by):
        return {}
    ends = cmap.intervals(tasks=tasks, by=by)
    found: dict[str, dict[str, Any]] = {name: {"interval": list(interval)} for name, interval in ends.items()}
    if top_k is not None:
        for name, probability in cmap.top_k_probability(top_k, tasks, by).items():
            found[name]["top_k_probability"] = round(probability, 3)
    return found


def _knows_noise(cmap: ConflictMap, tasks: Sequence[str] | None, by: By) -> bool:
    whole = by == "count" and (tasks is None or set(tasks) == set(cmap.tasks))
    return cmap.has_series if whole else cmap.pair_bin_steps > 0


def unsure_why(
    cmap: ConflictMap, threshold: float | None = None, tasks: Sequence[str] | None = None, by: By = "count"
) -> str:
    """Why `ranked_layers` does not say how sure the ranking is; empty if it does."""
    if threshold not in (None, cmap.threshold):
        return (
            f"No intervals: the map keeps its scores over time only at its own S={cmap.threshold:g}. To see how sure "
            f"the ranking is at {threshold:g}, profile with --threshold {threshold:g}."
        )
    if _knows_noise(cmap, tasks, by):
        return ""
    if cmap.steps == 1:
        return "No intervals: one step does not show how sure the ranking is. Profile more steps."
    older = ", as older ones," if cmap.has_series else ""
    return f"No intervals: merged and imported maps{older} do not keep the scores over time that intervals come from."


def nothing_text(
    cmap: ConflictMap,
    layers: list[dict[str, Any]],
    threshold: float | None = None,
    tasks: Sequence[str] | None = None,
    by: By = "count",
) -> str:
    """That there is nothing to branch, where none of the `ranked_layers` has a score; else empty."""
    if _has_conflict(layers):
        return ""
    who = f"{' and '.join(tasks)} never" if tasks else "no two tasks"
    at = cmap.threshold if threshold is None else threshold
    above = " more often than a task has with itself" if by == "excess" else ""
    return f"There is nothing to branch: {who} had a cosine below {at:g}{above} in any shared layer."


def notes_below(
    cmap: ConflictMap,
    layers: list[dict[str, Any]],
    threshold: float | None = None,
    tasks: Sequence[str] | None = None,
    by: By = "count",
) -> list[str]:
    """What to read under a ranking with its quarters."""
    at = "" if threshold in (None, cmap.threshold) else f", at {cmap.threshold:g}"
    notes = [
        unsure_why(cmap, threshold, tasks, by),
        f"q1-q4: the share in each quarter of the training{at}.",
        met_text(cmap, tasks),
        FLOOR if cmap.has_floor else "",
        nothing_text(cmap, layers, threshold, tasks, by),
    ]
    return [note for note in notes if note]


def _has_conflict(layers: list[dict[str, Any]]) -> bool:
    return any(layer["score"] for layer in layers)


def ranking_table(
    layers: list[dict[str, Any]],
    top: int | None = None,
    quarters: bool = False,
    top_k: int | None = None,
    by: By = "count",
) -> str:
    """A ranking's first layers as text: a line under the first `top_k`, and which layers are within noise of it.

    Where no layer has a score, there is no such line: the order is the model's.
    """
    if not _has_conflict(layers):
        top_k = None
    shown = layers[:top]
    columns = [
        ("rank", [str(layer["rank"]) for layer in shown]),
        ("layer", [layer["name"] for layer in shown]),
        ("type", [layer["type"] or "-" for layer in shown]),
        ("parameters", [_number(layer["parameters"]) for layer in shown]),
        ("score" if by == "count" else by, [score_text(layer["score"], by) for layer in shown]),
    ]
    if any("interval" in layer for layer in shown):
        columns.append(("90% interval", [_interval(layer["interval"], by) for layer in shown]))
    knows_cut = top_k is not None and all("top_k_probability" in layer for layer in layers)
    if knows_cut:
        columns.append((f"in top {top_k}", [_probability(layer) for layer in shown]))
    for what in _shares_to_show(layers, by):
        columns.append((what, [score_text(layer[what], "rate") for layer in shown]))
    if quarters:
        columns += [(f"q{i + 1}", [score_text(layer["quarters"][i], "rate") for layer in shown]) for i in range(4)]
    header, cells = zip(*columns, strict=True)
    lines = text_table(header, list(zip(*cells, strict=True)), left=3).splitlines()
    if top_k is not None and top_k <= len(shown) and top_k < len(layers):
        lines.insert(2 + top_k, lines[1])
    if len(shown) < len(layers):
        lines.append(f"... and {len(layers) - len(shown)} more")
    text = "\n".join(lines)
    return f"{text}\n{_noise_at_cut(layers, top_k)}" if knows_cut else text


def _shares_to_show(layers: list[dict[str, Any]], by: By) -> list[str]:
    """`rate` only where it is not the share of all that was seen: where some pairs met more often than others."""
    uneven = any(abs(layer["share"] - layer["rate"]) > 1e-9 for layer in layers if "rate" in layer)
    asked = [("share", by == "count"), ("rate", uneven and by != "rate"), ("floor", True), ("excess", by != "excess")]
    return [what for what, wanted in asked if wanted and all(what in layer for layer in layers)]


def _interval(ends: Sequence[float], by: By) -> str:
    low, high = ends
    return f"{low}-{high}" if by == "count" else f"{100 * low:.1f}-{100 * high:.1f}%"


def met_text(cmap: ConflictMap, tasks: Sequence[str] | None = None) -> str:
    """Which pairs the map knows nothing or little of; empty if there are none."""
    if not cmap.tasks or any(layer.observed is None for layer in cmap.layers):
        return ""
    never, rarely = cmap.never_met(tasks), cmap.rarely_met(tasks)
    lines = [f"Never met in a step, so nothing is known of their conflict: {_pairs(never)}."] if never else []
    lines += [f"Met in few steps: {_pairs(rarely)}. Compare layers --by rate."] if rarely else []
    return "\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    from recon.plans.scoring import named  # late: it imports numpy

    return named(pairs)


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
