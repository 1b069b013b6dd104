"""Conflict maps: what a profile writes and a plan is made from. No torch is needed to read one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.maps.comparison import MapComparison
    from recon.maps.conflict_map import ConflictMap
    from recon.maps.published import read_published
    from recon.maps.score_table import LayerConflicts

__all__ = ["ConflictMap", "LayerConflicts", "MapComparison", "read_published"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "ConflictMap": "conflict_map",
            "LayerConflicts": "score_table",
            "MapComparison": "comparison",
            "read_published": "published",
        },
    )
