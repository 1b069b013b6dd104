"""What the authors of Recon report, in the rows and columns of a bench's table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recon.experiments.comparison_rows import RunRow, columns_of, row_title
from recon.problems.paper import PaperTable
from recon.support.tables import short_number, text_table

_MEGABYTE = 2**20 / 4  # float32 parameters


def paper_key(method: str, surgery: str) -> tuple[str, str]:
    """What the paper's tables call a variant: method and surgery without their options."""
    return method.partition(":")[0], surgery.partition(" ")[0]


def paper_table(rows: Sequence[RunRow], paper: PaperTable) -> str:
    """The same rows and columns with the paper's figures; a dash where it has none."""
    columns = columns_of(rows[0])
    cells = []
    for row in rows:
        theirs = paper.rows.get(_key(row))
        if theirs is None:
            cells.append([row_title(row), *("-" for _ in columns), "-", "-"])
            continue
        known = {
            (task, name): value * factor
            for (task, name, factor), value in zip(paper.columns, theirs.metrics, strict=True)
        }
        values = [known.get(names[0] if len(names) == 1 else ("", names[0][1])) for _, names in columns]
        cells.append(
            [
                row_title(row),
                *("-" if value is None else f"{value:.{4 if abs(value) < 10 else 2}f}" for value in values),
                "-" if theirs.delta_m is None else f"{theirs.delta_m:+.2f}",
                short_number(theirs.size * _MEGABYTE),
            ]
        )
    return text_table(["method", *("\n".join(title) for title, _ in columns), "Δm %", "#P"], cells)


def paper_data(row: RunRow, paper: PaperTable | None) -> dict[str, Any] | None:
    """The paper's figures of a row as plain values."""
    theirs = None if paper is None else paper.rows.get(_key(row))
    if paper is None or theirs is None:
        return None
    named = zip(paper.columns, theirs.metrics, strict=True)
    return {
        "table": paper.number,
        "results": [{"task": t, "metric": m, "value": value * factor} for (t, m, factor), value in named],
        "delta_m": theirs.delta_m,
        "megabytes": theirs.size,
    }


def _key(row: RunRow) -> tuple[str, str]:
    return paper_key(row.first.method, row.first.surgery)
