"""Tables and numbers as text, for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recon.errors import cut, printable

_WIDEST = 200  # letters of a cell, so that one endless name does not stretch every line


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width under a ruled header, in which a line break makes a second line.

    The first `left` columns are aligned to the left; the others, numbers, to the right.
    """
    rows = [[cut(printable(cell, keep=""), _WIDEST) for cell in row] for row in rows]
    titles = [title.split("\n") for title in header]
    lines = max(map(len, titles))
    header_rows = list(zip(*([*[""] * (lines - len(title)), *title] for title in titles), strict=True))
    widths = [max(map(len, column)) for column in zip(*header_rows, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([*map(line, header_rows), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def short_number(count: float) -> str:
    """A count in three digits and a unit, as in "78.0k" or "11.2M"; whole below a thousand."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g}".rstrip(".") + unit
    return f"{count:.0f}"


def counted(count: int, noun: str) -> str:
    """A number of things, as in "1 layer" or "2 layers"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def with_ratio(text: str, ratio: float | None) -> str:
    """A number's text and its ratio to a reference, as in "11.2M (1.50x)"."""
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def metric_text(value: float) -> str:
    """A metric with four decimals, or five digits in all if it is large."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """`{task: {metric: value}}` as a table."""
    rows = [[task, name, metric_text(value)] for task, values in results.items() for name, value in values.items()]
    return text_table(["task", "metric", "value"], rows, left=2)
