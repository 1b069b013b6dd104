"""The results of `recon bench` in the layout of the paper's tables, and the paper's own beside them. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from recon import training
from recon.errors import UsageError
from recon.experiments.run import Run
from recon.problems.paper import PaperTable
from recon.support.tables import short_number, text_table, with_ratio

_MOST_METRICS = 12  # more columns than that do not fit on a line
_MEGABYTE = 2**20 / 4  # float32 parameters
REFERENCE = "joint"
"""The variant that cost ratios refer to."""


@dataclass(frozen=True)
class Row:
    """A variant's runs of all seeds.

    Args:
        label: of the variant.
        method: the gradient method.
        surgery: how its layers were chosen; empty for a plain model.
        metrics: `{(task, metric): value of each seed}`.
        deltas: Δm of each seed, in percent; empty where it cannot be had.
        parameters: mean over the seeds.
        macs: forward multiply-adds per sample, mean over the seeds.
        seconds: of a training step.
    """

    label: str
    method: str
    surgery: str
    metrics: Mapping[tuple[str, str], Sequence[float]]
    deltas: Sequence[float]
    parameters: float
    macs: float
    seconds: float

    @property
    def title(self) -> str:
        """What the table calls it: a branched model stands under its plain one."""
        return f"  w/ {self.surgery}" if self.surgery else self.method

    @property
    def key(self) -> tuple[str, str]:
        """What the paper's tables call it: method and surgery without their options."""
        return self.method.partition(":")[0], self.surgery.partition(" ")[0]


def make_rows(runs: Mapping[str, Sequence[Run]], seconds: Mapping[str, float], notes: list[str]) -> list[Row]:
    """A row for each variant; why a Δm cannot be had is added to the notes."""
    baselines = next(of_seeds for of_seeds in runs.values() if of_seeds[0].is_single_task)
    rows = []
    for label, of_seeds in runs.items():
        first = of_seeds[0]
        names = [(task, name) for task, values in first.results.items() for name in values]
        rows.append(
            Row(
                label,
                first.method,
                first.surgery,
                {(task, name): [run.results[task][name] for run in of_seeds] for task, name in names},
                _deltas(of_seeds, baselines, notes),
                fmean(run.parameters for run in of_seeds),
                fmean(run.macs for run in of_seeds),
                seconds[label],
            )
        )
    return rows


def _deltas(runs: Sequence[Run], baselines: Sequence[Run], notes: list[str]) -> list[float]:
    try:
        return [
            training.delta_m(run.results, alone.results, run.higher_is_better)
            for run, alone in zip(runs, baselines, strict=True)
        ]
    except UsageError as error:
        note = f"Δm cannot be had: {error}"
        notes += [] if note in notes else [note]
        return []


def results_table(rows: Sequence[Row]) -> str:
    """The rows, means and standard deviations over the seeds; ratios are to plain joint training, or the first row."""
    columns = _columns(rows[0])
    plain = [row for row in rows if not row.surgery and row.method != rows[0].method]
    reference = next((row for row in rows if row.label == REFERENCE), (plain or list(rows))[0])
    header = ["method", *(title for title, _ in columns), "Δm %", "#P", "multiply-\nadds", "ms/step"]
    cells = [
        [
            row.title,
            *(spread(_mean_over(row, names)) for _, names in columns),
            spread(row.deltas, 2, sign=True),
            with_ratio(short_number(row.parameters), _ratio(row.parameters, reference.parameters)),
            with_ratio(short_number(row.macs), _ratio(row.macs, reference.macs)),
            with_ratio(f"{1000 * row.seconds:.1f}", _ratio(row.seconds, reference.seconds)),
        ]
        for row in rows
    ]
    return text_table(header, cells)


def _columns(row: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titles, and the metrics that each is the mean of."""
    names = list(row.metrics)
    if len(names) <= _MOST_METRICS:
        return [(f"{task}\n{name}", [(task, name)]) for task, name in names]
    kinds = dict.fromkeys(name for _, name in names)
    return [(f"mean\n{kind}", [(task, name) for task, name in names if name == kind]) for kind in kinds]


def _mean_over(row: Row, names: Sequence[tuple[str, str]]) -> list[float]:
    """By seed."""
    return [fmean(values) for values in zip(*(row.metrics[name] for name in names), strict=True)]


def paper_table(rows: Sequence[Row], paper: PaperTable) -> str:
    """The same rows and columns with the paper's figures; a dash where it has none."""
    columns = _columns(rows[0])
    cells = []
    for row in rows:
        theirs = paper.rows.get(row.key)
        if theirs is None:
            cells.append([row.title, *("-" for _ in columns), "-", "-"])
            continue
        known = {
            (task, name): value * factor
            for (task, name, factor), value in zip(paper.columns, theirs.metrics, strict=True)
        }
        values = [known.get(names[0] if len(names) == 1 else ("", names[0][1])) for _, names in columns]
        cells.append(
            [
                row.title,
                *("-" if value is None else _number(value) for value in values),
                "-" if theirs.delta_m is None else f"{theirs.delta_m:+.2f}",
                short_number(theirs.size * _MEGABYTE),
            ]
        )
    return text_table(["method", *(title for title, _ in columns), "Δm %", "#P"], cells)


def spread(values: Sequence[float], digits: int | None = None, sign: bool = False) -> str:
    """Mean, and standard deviation where there are several values."""
    if not values:
        return "-"
    mean = fmean(values)
    text = _number(mean) if digits is None else f"{mean:{'+' if sign else ''}.{digits}f}"
    if len(values) == 1:
        return text
    places = len(text.partition(".")[2])
    return f"{text} ± {stdev(values):.{places}f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


def rows_data(rows: Sequence[Row], paper: PaperTable | None) -> list[dict[str, Any]]:
    """The rows as plain values, the paper's among them."""
    data = []
    for row in rows:
        results: dict[str, dict[str, Any]] = {}
        for (task, name), values in row.metrics.items():
            results.setdefault(task, {})[name] = list(values)
        data.append(
            {
                "label": row.label,
                "method": row.method,
                "surgery": row.surgery,
                "results_by_seed": results,
                "delta_m_by_seed": list(row.deltas),
                "parameters": row.parameters,
                "macs": row.macs,
                "seconds_per_step": row.seconds,
                "paper": _paper_data(row, paper),
            }
        )
    return data


def _paper_data(row: Row, paper: PaperTable | None) -> dict[str, Any] | None:
    theirs = None if paper is None else paper.rows.get(row.key)
    if paper is None or theirs is None:
        return None
    named = zip(paper.columns, theirs.metrics, strict=True)
    return {
        "table": paper.number,
        "results": [{"task": t, "metric": m, "value": value * factor} for (t, m, factor), value in named],
        "delta_m": theirs.delta_m,
        "megabytes": theirs.size,
    }
