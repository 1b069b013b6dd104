"""Training runs side by side: how well each does, against single-task models, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from recon import problems
from recon.errors import UsageError
from recon.experiments.run import Run
from recon.support.files.documents import json_values
from recon.support.tables import metric_text, short_number, text_table, with_ratio

_MOST_METRICS = 12  # more columns than that do not fit on a line


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Args:
        name: the run's name in this comparison.
        run: its record.
        mean: over the tasks, of their first metric; None where that is not the same metric for all.
        delta_m: Δm in percent against the baseline; None without one.
        parameters_ratio: parameters, divided by those of the reference run.
        macs_ratio: forward multiply-adds per sample, divided by those of the reference run; None if it has none.
    """

    name: str
    run: Run
    mean: float | None
    delta_m: float | None
    parameters_ratio: float | None
    macs_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "name": self.name,
            "label": self.run.label,
            "backbone": self.run.backbone,
            "results": self.run.results,
            "mean": self.mean,
            "delta_m": self.delta_m,
            "parameters": self.run.parameters,
            "parameters_ratio": self.parameters_ratio,
            "macs": self.run.macs,
            "macs_ratio": self.macs_ratio,
            "seconds_per_step": self.run.seconds_per_step,
        }


@dataclass(frozen=True)
class Comparison:
    """Runs of one problem side by side.

    Args:
        rows: one a run.
        baseline: the label of the run that Δm refers to; None without one.
        reference: the name of the run that cost ratios refer to.
        mean_metric: the first metric of every task, if it is the same one.
        notes: what a reader of the table should know.
    """

    rows: list[Row]
    baseline: str | None
    reference: str
    mean_metric: str | None
    notes: list[str]

    def text(self) -> str:
        """The comparison as a plain text table."""
        metrics = [(task, name) for task, values in self.rows[0].run.results.items() for name in values]
        metrics = metrics if len(metrics) <= _MOST_METRICS else []
        labelled = any(row.name != row.run.label for row in self.rows)
        header = ["run", "how"][: 1 + labelled] + [f"{task} {name}" for task, name in metrics]
        header += [f"mean {self.mean_metric}"] if self.mean_metric else []
        header += ["Δm %", "parameters", "multiply-adds", "ms/step"]
        rows = []
        for row in self.rows:
            run = row.run
            cells = [row.name, run.label][: 1 + labelled]
            cells += [metric_text(run.results[task][name]) for task, name in metrics]
            cells += [] if row.mean is None else [metric_text(row.mean)]
            cells += ["-" if row.delta_m is None else f"{row.delta_m:+.2f}"]
            cells += [with_ratio(short_number(run.parameters), row.parameters_ratio)]
            cells += [with_ratio(short_number(run.macs), row.macs_ratio)]
            rows.append([*cells, f"{1000 * run.seconds_per_step:.1f}"])
        return text_table(header, rows, left=1 + labelled)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return json_values(
            {
                "problem": self.rows[0].run.problem,
                "baseline": self.baseline,
                "reference": self.reference,
                "mean_metric": self.mean_metric,
                "rows": [row.as_dict() for row in self.rows],
                "notes": self.notes,
            }
        )


def compare(runs: Mapping[str, Run], baseline: Run | None = None) -> Comparison:
    """Put finished runs of one problem side by side.

    Args:
        runs: `{name: run}`, in the order of the table.
        baseline: what Δm refers to; the first single-task run among `runs` when not given.

    Raises:
        UsageError: no runs, an unfinished one, or runs of different problems, tasks or metrics.
    """
    if not runs:
        raise UsageError("There are no runs to compare.")
    baselines = {name: run for name, run in runs.items() if run.is_single_task}
    everything = {**runs, **({} if baseline is None else {f"the baseline {baseline.label!r}": baseline})}
    _check(everything)
    notes = [*_notes(runs), *_backbone_notes(everything)]
    if baseline is None and baselines:
        name, baseline = next(iter(baselines.items()))
        notes += [f"There are several single-task runs; Δm refers to {name}."] if len(baselines) > 1 else []
    elif baseline is None:
        notes.append(
            "Δm needs a single-task run: train one with `recon train PROBLEM --single-task --out single`, then add it "
            "to the runs or pass `--baseline single`."
        )
    deltas = _deltas(runs, baseline, notes)
    plain = (name for name, run in runs.items() if run.is_plain)
    reference = next(plain, min(runs, key=lambda name: runs[name].parameters))
    metric = _common_metric(next(iter(runs.values())))
    rows = [
        Row(
            name,
            run,
            mean=None if metric is None else fmean(results[metric] for results in run.results.values()),
            delta_m=deltas[name],
            parameters_ratio=_ratio(run.parameters, runs[reference].parameters),
            macs_ratio=_ratio(run.macs, runs[reference].macs),
        )
        for name, run in runs.items()
    ]
    return Comparison(rows, None if baseline is None else baseline.label, reference, metric, notes)


def _check(runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        if not run.finished:
            raise UsageError(f"{name} is not a finished run: {_how_to_finish(name, run)}")
    _check_same("problem", {name: run.problem for name, run in runs.items()})
    _check_same("tasks", {name: ", ".join(sorted(run.tasks)) for name, run in runs.items()})
    _check_same("metrics", {name: ", ".join(_metrics(run)) for name, run in runs.items()})


def _how_to_finish(name: str, run: Run) -> str:
    train = f"recon train {run.problem if run.problem in problems.names() else 'PROBLEM'}"
    again = f"Give the command that began it once more, with --resume: {train}"
    if run.is_single_task:
        return f"it was stopped. {again} --single-task --out {name} --resume."
    if run.history:
        return f"it stopped after {len(run.history)} of {run.epochs} epochs. {again} --out {name} --resume."
    return f"it was never trained. Train it: {train} --model {name} --out FOLDER."


def _check_same(what: str, values: Mapping[str, str]) -> None:
    (first, expected), *others = values.items()
    for name, value in others:
        if value != expected:
            raise UsageError(
                f"Only runs of the same {what} can be compared, but {first} has {expected!r} and {name} has {value!r}. "
                "Compare them apart."
            )


def _metrics(run: Run) -> Iterable[str]:
    return (f"{task} {name}" for task in sorted(run.results) for name in sorted(run.results[task]))


def _common_metric(run: Run) -> str | None:
    # The first by the tasks' own order; all tasks must mean the same thing by it.
    first = {next(iter(metrics), "") for metrics in run.results.values()}
    return first.pop() or None if len(first) == 1 else None


def _deltas(runs: Mapping[str, Run], baseline: Run | None, notes: list[str]) -> dict[str, float | None]:
    if baseline is None:
        return dict.fromkeys(runs)
    from recon.training import delta_m  # late: it imports torch

    try:
        return {name: delta_m(run.results, baseline.results, run.higher_is_better) for name, run in runs.items()}
    except UsageError as error:
        notes.append(f"Δm cannot be had: {error}")
        return dict.fromkeys(runs)


def _notes(runs: Mapping[str, Run]) -> list[str]:
    epochs = {name: run.epochs for name, run in runs.items()}
    if len(set(epochs.values())) == 1:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in epochs.items())
    return [f"The runs trained for different numbers of epochs: {listed}."]


def _backbone_notes(runs: Mapping[str, Run]) -> list[str]:
    backbones = {name: run.backbone or "the problem's own" for name, run in runs.items()}
    if len(set(backbones.values())) == 1:
        return []
    return [f"The runs have different networks: {', '.join(f'{name} {of}' for name, of in backbones.items())}."]


def _ratio(count: int, reference: int) -> float | None:
    return count / reference if reference else None
