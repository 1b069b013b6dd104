"""The folder that a problem's data set lies in, and what is said where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recon.errors import ProblemError, UsageError, shortened


def open_root(name: str, data_root: str | Path | None, expected: str) -> Path:
    """The data root as a path.

    Args:
        name: of the problem.
        data_root: what the user gave.
        expected: which files are read from where in it, and the data set's official source: whole sentences.

    Raises:
        UsageError: none was given.
        ProblemError: there is no such folder.
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
    """See that files or folders are there.

    Args:
        name: of the problem.
        root: its data root.
        paths: relative to the root, or beginning with it.
        expected: see `open_root`.

    Raises:
        ProblemError: some are missing.
    """
    places = [path if path.is_relative_to(root) else root / path for path in map(Path, paths)]
    missing = [str(place.relative_to(root)) for place in places if not place.exists()]
    if missing:
        raise ProblemError(f"{root} lacks files of {name}: {shortened(missing, 8)}. {expected}")
