"""The folder of a problem's data set, with errors that say what belongs there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recon.errors import ProblemError, UsageError, shortened


def open_root(name: str, data_root: str | Path | None, expected: str) -> Path:
    """The data root as a path; an error if there is none, or no such folder.

    The error has the sentences of `expected`: which files belong there, and the data set's official source.
    """
    if data_root is None:
        raise UsageError(
            f"{name} reads its data set from disk. Pass --data-root DIR (data_root=DIR in Python). {expected}"
        )
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise ProblemError(f"There is no folder {root} to read {name} from. {expected}")
    return root


def require_files(name: str, root: Path, paths: Iterable[str | Path], expected: str) -> None:
    """Raise a ProblemError if files or folders are missing; paths are relative to the root, or begin with it."""
    places = [path if path.is_relative_to(root) else root / path for path in map(Path, paths)]
    missing = [str(place.relative_to(root)) for place in places if not place.exists()]
    if missing:
        raise ProblemError(f"{root} lacks files of {name}: {shortened(missing, 8)}. {expected}")
