"""The rows of a comparison of runs, each over its seeds, and the columns of its table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from recon.experiments.run import Run
from recon.support.tables import metric_text, short_number, with_ratio

_MOST_METRICS = 12  # more columns than that do not fit on a line

Column = tuple[tuple[str, str], list[tuple[str, str]]]
"""The two words of a title, and the (task, metric) pairs that the column is the mean of."""


@dataclass(frozen=True)
class RunRow:
    """The runs of one name in a comparison, one for each seed."""

    name: str
    runs: Sequence[Run]
    seconds: float  # of a training step
    mean: float | None = None  # of the tasks' first metric over seeds and tasks; None where that differs between tasks
    deltas: Sequence[float] = ()  # Δm of each seed in percent against the baseline; empty without one
    parameters_ratio: float | None = None  # to the reference row, as those that follow
    macs_ratio: float | None = None  # of forward multiply-adds per sample; None if the reference has none
    seconds_ratio: float | None = None

    @property
    def first(self) -> Run:
        """The first seed's run, in whose label, method and surgery all agree."""
        return self.runs[0]

    @property
    def parameters(self) -> float:
        """Mean over the seeds."""
        return mean_of([run.parameters for run in self.runs])

    @property
    def macs(self) -> float:
        """Forward multiply-adds per sample, mean over the seeds."""
        return mean_of([run.macs for run in self.runs])

    @property
    def delta_m(self) -> float | None:
        """Mean over the seeds."""
        return mean_of(self.deltas) if self.deltas else None

    @property
    def metrics(self) -> dict[tuple[str, str], list[float]]:
        """`{(task, metric): value of each seed}`."""
        names = [(task, name) for task, values in self.first.results.items() for name in values]
        return {(task, name): [run.results[task][name] for run in self.runs] for task, name in names}

    def mean_over(self, names: Iterable[tuple[str, str]]) -> list[float]:
        """The mean of these metrics by seed."""
        metrics = self.metrics
        return [mean_of(values) for values in zip(*(metrics[name] for name in names), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        by_seed: dict[str, dict[str, list[float]]] = {}
        for (task, name), values in self.metrics.items():
            by_seed.setdefault(task, {})[name] = values
        return {
            "name": self.name,
            "label": self.first.label,
            "method": self.first.method,
            "surgery": self.first.surgery,
            "backbone": self.first.backbone,
            "results": {t: {name: mean_of(values) for name, values in of.items()} for t, of in by_seed.items()},
            "results_by_seed": by_seed,
            "mean": self.mean,
            "delta_m": self.delta_m,
            "delta_m_by_seed": list(self.deltas),
            "parameters": self.parameters,
            "parameters_ratio": self.parameters_ratio,
            "macs": self.macs,
            "macs_ratio": self.macs_ratio,
            "seconds_per_step": self.seconds,
        }


def columns_of(row: RunRow) -> list[Column]:
    """A column for each metric, or where those are too many, for the mean of each metric over the tasks."""
    names = list(row.metrics)
    if len(names) <= _MOST_METRICS:
        return [((task, name), [(task, name)]) for task, name in names]
    kinds = dict.fromkeys(name for _, name in names)
    return [(("mean", kind), [(task, name) for task, name in names if name == kind]) for kind in kinds]


def row_title(row: RunRow) -> str:
    """What a table by method calls the row."""
    return f"  w/ {row.first.surgery}" if row.first.surgery else row.first.method


def spread(values: Sequence[float], digits: int | None = None, sign: bool = False) -> str:
    """Mean, and standard deviation where there are several values."""
    if not values:
        return "-"
    mean = fmean(values)
    if digits is not None:
        text = f"{mean:{'+' if sign else ''}.{digits}f}"
    else:
        text = metric_text(mean) if len(values) == 1 else f"{mean:.{4 if abs(mean) < 10 else 2}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{len(text.partition('.')[2])}f}"


def cells(row: RunRow, columns: Sequence[Column]) -> list[str]:
    """The cells for the metrics, Δm, the parameters and the multiply-adds."""
    return [
        *(spread(row.mean_over(names)) for _, names in columns),
        spread(row.deltas, 2, sign=True),
        with_ratio(short_number(row.parameters), row.parameters_ratio),
        with_ratio(short_number(row.macs), row.macs_ratio),
    ]


def mean_of(values: Sequence[float]) -> float:
    """The mean; of one value, that value."""
    return values[0] if len(values) == 1 else fmean(values)  # a count stays one
