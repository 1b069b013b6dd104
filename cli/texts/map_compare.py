"""What `recon map compare` prints: how two maps were made, and how they agree."""

from __future__ import annotations

import math
import textwrap
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import shortened
from recon.support.tables import text_table
from recon_cli.texts.map_show import made_by_text

if TYPE_CHECKING:
    from recon import ConflictMap
    from recon.maps import MapComparison
    from recon.maps.comparison import LayerRanks

Maps = tuple["ConflictMap", "ConflictMap"]
Files = tuple[Path, Path]


def comparison_text(files: Files, maps: Maps, found: MapComparison, threshold: float | None, top: int | None) -> str:
    """Two maps side by side: how each was made, how far they agree, and layer by layer."""
    lines = [_origins(files, maps, threshold), "", *_agreement(found), "", _layers(found, top)]
    left_out = len(found.layers) - (top or len(found.layers))
    return "\n".join(lines + [f"... and {left_out} more"] * (left_out > 0))


def comparison_data(
    files: Files, maps: Maps, found: MapComparison, threshold: float | None, top: int | None
) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "maps": [
            {
                "map": str(file),
                "tasks": cmap.tasks,
                "threshold": cmap.threshold if threshold is None else threshold,
                "steps": cmap.steps,
                "layers": len(cmap.layers),
                "only": only,
                "made_by": cmap.made_by,
            }
            for file, cmap, only in zip(files, maps, found.only, strict=True)
        ],
        "common": len(found.layers),
        "spearman": found.spearman,
        "kendall": found.kendall,
        "mean_rank_shift": found.mean_shift,
        "top_k": found.top_k,
        "overlap": found.overlap,
        "regrouped": found.regrouped,
        "jaccard": found.jaccard,
        "layers": [
            {"name": of.name, "ranks": of.ranks, "shift": of.shift, "scores": of.scores, "shares": of.shares}
            for of in islice(found.layers, top)
        ],
    }


def _origins(files: Files, maps: Maps, threshold: float | None) -> str:
    columns = [
        {
            "map": str(file),
            "tasks": ", ".join(cmap.tasks) or "unknown",
            "threshold": f"{cmap.threshold if threshold is None else threshold:g}",
            "steps": "unknown" if cmap.steps is None else str(cmap.steps),
            "shared layers": str(len(cmap.layers)),
            **{
                key: textwrap.shorten(made_by_text(value), 50, placeholder=" ...")
                for key, value in cmap.made_by.items()
            },
        }
        for file, cmap in zip(files, maps, strict=True)
    ]
    keys = list(columns[0]) + [key for key in columns[1] if key not in columns[0]]
    rows = [[key, *(column.get(key, "-") for column in columns)] for key in keys]
    return text_table(["", "A", "B"], rows, left=3)


def _agreement(found: MapComparison) -> list[str]:
    only = [
        f"{len(names)} in {side} alone{f' ({shortened(names)})' if names else ''}"
        for names, side in zip(found.only, "AB", strict=True)
    ]
    regrouped = f"These join other layers in B than in A: {shortened(found.regrouped)}."
    return [
        textwrap.fill(f"Layers in common: {len(found.layers)}; {', '.join(only)}.", 100, break_on_hyphens=False),
        *([regrouped] if found.regrouped else []),
        f"Rank correlation: Spearman {_decimal(found.spearman)}, Kendall {_decimal(found.kendall)}; "
        f"mean |Δrank| {found.mean_shift:.2f}.",
        f"First {found.top_k} layers of both: {len(found.overlap)} the same, Jaccard {found.jaccard:.2f}.",
    ]


def _layers(found: MapComparison, top: int | None) -> str:
    known = [all(not math.isnan(of.shares[side]) for of in found.layers) for side in (0, 1)]
    titles = [f"{'share' if known[side] else 'score'} {'AB'[side]}" for side in (0, 1)]

    def row(of: LayerRanks) -> list[str]:
        values = [f"{100 * of.shares[side]:.1f}%" if known[side] else str(of.scores[side]) for side in (0, 1)]
        return [of.name, f"{of.ranks[0]:g}", f"{of.ranks[1]:g}", f"{of.shift:+g}", *values]

    return text_table(["layer", "rank A", "rank B", "Δrank", *titles], [row(of) for of in islice(found.layers, top)])


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
