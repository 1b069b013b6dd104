"""A conflict map's ranking as rows: for `recon profile` and `recon map show`."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from recon.tables import text_table

if TYPE_CHECKING:
    from recon import ConflictMap


def ranked_layers(cmap: ConflictMap, threshold: float | None = None) -> list[dict[str, Any]]:
    """The shared layers, highest score first, each with what the map tells of it."""
    scores, shares = cmap.scores(threshold), cmap.shares(threshold)
    quarters = dict(zip(scores, cmap.stage_shares().tolist(), strict=True))
    layers = {layer.name: layer for layer in cmap.layers}
    return [
        {
            "rank": rank,
            "name": name,
            "type": layers[name].kind,
            "parameters": layers[name].size,
            "score": scores[name],
            "share": shares[name],
            "quarters": quarters[name],
        }
        for rank, name in enumerate(cmap.ranking(threshold), start=1)
    ]


def ranking_table(layers: list[dict[str, Any]], top: int | None = None, quarters: bool = False) -> str:
    """The first layers of a ranking as text, with or without the shares by quarter of the training."""
    header = ["rank", "layer", "type", "parameters", "score", "share"] + ["q1", "q2", "q3", "q4"] * quarters
    rows = []
    for layer in islice(layers, top):
        row = [str(layer["rank"]), layer["name"], layer["type"], f"{layer['parameters']:,}", str(layer["score"])]
        shares = [layer["share"]] + layer["quarters"] * quarters
        rows.append(row + [f"{100 * share:.1f}%" if share == share else "-" for share in shares])
    text = text_table(header, rows, left=3)
    left_out = len(layers) - len(rows)
    return f"{text}\n... and {left_out} more" if left_out else text
