"""ConflictMap: how often the tasks' gradients conflicted in each shared layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recon.maps.files.map_file import read, write
from recon.maps.measures import By
from recon.maps.merge import merge
from recon.maps.score_table import ScoreTable

if TYPE_CHECKING:
    from recon.maps.comparison import MapComparison


class ConflictMap(ScoreTable):
    """The S-conflict scores of every shared layer (Shi et al. 2023, definition 4), at every threshold.

    Its fields, and what is computed from them, are those of `recon.maps.score_table.ScoreTable`.
    """

    def compare(
        self,
        other: ConflictMap,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        rename: Mapping[str, str] | None = None,
        tasks: Sequence[str] | None = None,
        by: By = "count",
    ) -> MapComparison:
        """How similarly another map ranks the layers, over the layers that both have.

        The two may differ in data, tasks, threshold, method or seed.

        Args:
            other: the map to compare with.
            threshold: S for both; either map's own when not given.
            top_k: at which K to compare what would be branched; a quarter of the common layers when not given.
            rename: `{old prefix: new prefix}` of the other map's layer names.
            tasks: whose pairs count, in both maps; all of either map when not given.
            by: `count`, `rate` or `excess`, see `scores`; by rate, maps of different lengths have like scores.

        Raises:
            MapMismatchError: the maps have no layer in common.
            UsageError: `top_k` is out of range, or a map has no such scores.
            UnknownNameError: a rename changes no name, or a map lacks one of the tasks.
        """
        from recon.maps.comparison import compare  # late: it imports scipy, which is slow

        return compare(self, other, threshold=threshold, top_k=top_k, rename=rename, tasks=tasks, by=by)

    @staticmethod
    def merge(maps: Sequence[ConflictMap], names: Sequence[str] = ()) -> ConflictMap:
        """The maps of several runs added up, quarter by quarter, in the first one's order of tasks and layers.

        A merged map has no series, since a stretch of training cannot run from one run into the next. It keeps the
        thresholds around S that all have, and the noise floor of the runs that took one.

        Args:
            maps: two or more, of different runs with the same tasks, threshold, layers and parameter shapes.
            names: what to call them in messages and in `made_by`; "map 1", "map 2"... when not given.

        Raises:
            MapMismatchError: the maps do not fit together; the message says why.
            UsageError: fewer than two maps, or the same one twice.
        """
        return merge(maps, names)

    def save(self, path: str | Path) -> None:
        """Write the map as one JSON object, a line a layer, atomically.

        Raises:
            UsageError: the path cannot be written.
        """
        write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ConflictMap:
        """Read a map that `save` wrote.

        Raises:
            MapFileError: missing, truncated, of an unknown version, or with a wrong field.
        """
        return read(path, cls)
