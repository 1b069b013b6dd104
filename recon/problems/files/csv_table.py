"""CSV files, with errors that name the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recon.errors import ProblemError

_LONGEST = 4096  # characters of an entry


@dataclass(frozen=True)
class CsvTable:
    """A CSV file's columns, `{name: (N,) of str}`, and the number of each row's line, `(N,)`."""

    path: Path
    lines: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.lines)

    def require(self, column: str, right: np.ndarray, expected: str) -> None:
        """Raise a ProblemError that names the first entry of a column that is not `right`, `(N,)` of bool."""
        if not right.all():
            first = int(np.argmin(right))
            value = str(self.columns[column][first])
            raise ProblemError(
                f"{self.path}, line {self.lines[first]}: the {column} is {value!r}, but must be {expected}. Fix the "
                "line, or download the file again."
            )


def read_csv(path: Path, columns: Sequence[str], *, header: bool, comment: str | None = None) -> CsvTable:
    """The columns of these names, without spaces around entries, empty lines, and lines that begin with `comment`.

    With a header, the first line names the columns, in any order, and there may be others; without, `columns` are all
    columns in order.
    """
    lines, rows = _rows(path, comment)
    names = [name.strip() for name in rows.pop(0)] if header and rows else list(columns)
    lines = lines[len(lines) - len(rows) :]
    missing = [name for name in columns if name not in names]
    if any(names.count(name) > 1 for name in columns):
        raise ProblemError(f"The first line of {path} names a column twice. Download it again.")
    if missing:
        raise ProblemError(
            f"The first line of {path} must name the columns, but lacks {', '.join(missing)}. Download it again."
        )
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(names):
            raise ProblemError(
                f"{path}, line {line}: there must be {len(names)} entries, but there are {len(row)}. Fix the line, or "
                "download the file again."
            )
        if max(map(len, row)) > _LONGEST:  # numpy gives every row as much room as the longest entry needs
            raise ProblemError(f"{path}, line {line}: an entry has more than {_LONGEST} characters. Download it again.")
    if not rows:
        raise ProblemError(f"{path} has no rows. Download it again.")
    entries = dict(zip(names, zip(*rows, strict=True), strict=True))
    return CsvTable(path, np.array(lines), {name: np.char.strip(np.array(entries[name])) for name in columns})


def _rows(path: Path, comment: str | None) -> tuple[list[int], list[list[str]]]:
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if row and not (comment and row[0].startswith(comment)):
                    lines.append(reader.line_num)
                    rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProblemError(f"Cannot read {path}: {error}. Download it again, or fix its permissions.") from error
    return lines, rows
