"""Conflict maps: what a profile writes and a plan is made from. No torch is needed to read one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.maps.comparison import MapComparison
    from recon.maps.conflict_map import ConflictMap
    from recon.maps.counts import LayerConflicts, LayerFloor
    from recon.maps.published import read_published

__all__ = ["ConflictMap", "LayerConflicts", "LayerFloor", "MapComparison", "read_published"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "ConflictMap": "conflict_map",
            "LayerConflicts": "counts",
            "LayerFloor": "counts",
            "MapComparison": "comparison",
            "read_published": "published",
        },
    )
