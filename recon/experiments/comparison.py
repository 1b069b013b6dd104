"""Compare training runs over their seeds: how well each does, against single-task models, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recon import problems
from recon.errors import UsageError
from recon.experiments.comparison_rows import RunRow, cells, columns_of, mean_of, row_title
from recon.experiments.run import Run
from recon.support.files.documents import json_values
from recon.support.tables import text_table, with_ratio


@dataclass(frozen=True)
class Comparison:
    """Runs of one problem side by side."""

    rows: list[RunRow]  # one a name
    baseline: str | None  # the label of the run that Δm refers to
    reference: str  # the name of the row that cost ratios refer to
    mean_metric: str | None  # the first metric of every task, if it is the same one
    notes: list[str]  # what a reader of the table should know

    def text(self) -> str:
        """The comparison as a plain text table."""
        columns = columns_of(self.rows[0])
        if self.mean_metric and all(len(names) == 1 for _, names in columns):
            firsts = [(task, self.mean_metric) for task in self.rows[0].first.results]
            columns = [*columns, (("mean", self.mean_metric), firsts)]
        labelled = any(row.name != row.first.label for row in self.rows)
        header = [*["run", "how"][: 1 + labelled], *(" ".join(title) for title, _ in columns)]
        header += ["Δm %", "parameters", "multiply-adds", "ms/step"]
        rows = [
            [*[row.name, row.first.label][: 1 + labelled], *cells(row, columns), f"{1000 * row.seconds:.1f}"]
            for row in self.rows
        ]
        return text_table(header, rows, left=1 + labelled)

    def text_by_method(self) -> str:
        """The same in the layout of the paper's tables: a branched model stands under its plain one."""
        columns = columns_of(self.rows[0])
        header = ["method", *("\n".join(title) for title, _ in columns), "Δm %", "#P", "multiply-\nadds", "ms/step"]
        rows = [
            [row_title(row), *cells(row, columns), with_ratio(f"{1000 * row.seconds:.1f}", row.seconds_ratio)]
            for row in self.rows
        ]
        return text_table(header, rows)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return json_values(
            {
                "problem": self.rows[0].first.problem,
                "baseline": self.baseline,
                "reference": self.reference,
                "mean_metric": self.mean_metric,
                "rows": [row.as_dict() for row in self.rows],
                "notes": self.notes,
            }
        )


def compare(
    runs: Mapping[str, Run | Sequence[Run]],
    baseline: Run | None = None,
    *,
    reference: str | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Comparison:
    """Put finished runs of one problem side by side.

    Args:
        runs: `{name: run}`, or the runs of several seeds, in the order of the table.
        baseline: what Δm refers to. When not given, it is the first single-task run among `runs`; where that has
            several seeds, each run's Δm refers to the one of its own seed.
        reference: the name of what cost ratios refer to; the first plain run, or else the smallest, when not given.
        seconds: of a training step, by name; those that the runs have noted when not given.

    Raises:
        UsageError: no runs, an unfinished one, or runs of different problems, tasks or metrics.
    """
    if not runs:
        raise UsageError("There are no runs to compare.")
    seeds = {name: [of] if isinstance(of, Run) else list(of) for name, of in runs.items()}
    everything = [(name, run) for name, of_seeds in seeds.items() for run in of_seeds]
    everything += [] if baseline is None else [(f"the baseline {baseline.label!r}", baseline)]
    _check(everything)
    notes = [*_notes(dict(everything[: len(everything) - (baseline is not None)])), *_backbone_notes(dict(everything))]
    baselines = _baselines(seeds, notes) if baseline is None else [baseline]
    plain = (name for name, of_seeds in seeds.items() if of_seeds[0].is_plain)
    reference = reference or next(plain, min(seeds, key=lambda name: seeds[name][0].parameters))
    metric = _common_metric(everything[0][1])
    seconds = seconds or {name: mean_of([run.seconds_per_step for run in of_seeds]) for name, of_seeds in seeds.items()}
    other = RunRow(reference, seeds[reference], seconds[reference])
    rows = []
    for name, of_seeds in seeds.items():
        row = RunRow(name, of_seeds, seconds[name])
        firsts = [(task, metric) for task in of_seeds[0].results] if metric else []
        rows.append(
            replace(
                row,
                mean=mean_of(row.mean_over(firsts)) if metric else None,
                deltas=_deltas(of_seeds, baselines, notes),
                parameters_ratio=_ratio(row.parameters, other.parameters),
                macs_ratio=_ratio(row.macs, other.macs),
                seconds_ratio=_ratio(row.seconds, other.seconds),
            )
        )
    return Comparison(rows, baselines[0].label if baselines else None, reference, metric, notes)


def _baselines(runs: Mapping[str, Sequence[Run]], notes: list[str]) -> Sequence[Run]:
    """The single-task runs, if there are any; and a note where there are none, or several."""
    found = {name: of_seeds for name, of_seeds in runs.items() if of_seeds[0].is_single_task}
    if not found:
        notes.append(
            "Δm needs a single-task run: train one with `recon train PROBLEM --single-task --out single`, then add it "
            "to the runs, or pass it as the baseline (`--baseline single`; in Python, baseline=run)."
        )
        return []
    name = next(iter(found))
    if len(found) > 1:
        notes.append(f"There are several single-task runs; Δm refers to {name}.")
    return found[name]


def _deltas(runs: Sequence[Run], baselines: Sequence[Run], notes: list[str]) -> list[float]:
    """Δm by seed; empty where it cannot be computed, and then the notes say why."""
    if not baselines:
        return []
    from recon.training import delta_m  # late: it imports torch

    alone = baselines if len(baselines) > 1 else [baselines[0]] * len(runs)
    try:
        return [delta_m(r.results, b.results, r.higher_is_better) for r, b in zip(runs, alone, strict=True)]
    except UsageError as error:
        note = f"Δm cannot be computed: {error}"
        notes += [] if note in notes else [note]
        return []


def _check(runs: Sequence[tuple[str, Run]]) -> None:
    for name, run in runs:
        if not run.finished:
            raise UsageError(f"{name} is not a finished run: {_how_to_finish(name, run)}")
    _check_same("problem", [(name, run.problem) for name, run in runs])
    _check_same("tasks", [(name, ", ".join(sorted(run.tasks))) for name, run in runs])
    _check_same("metrics", [(name, ", ".join(_metrics(run))) for name, run in runs])


def _how_to_finish(name: str, run: Run) -> str:
    train = f"recon train {run.problem if run.problem in problems.names() else 'PROBLEM'}"
    again = f"Run the command that started it again, with --resume (in Python, resume=True): {train}"
    if run.is_single_task:
        return f"it was stopped. {again} --single-task --out {name} --resume."
    if run.history:
        return f"it stopped after {len(run.history)} of {run.epochs} epochs. {again} --out {name} --resume."
    return f"it was never trained. Train it: {train} --model {name} --out FOLDER."


def _check_same(what: str, values: Sequence[tuple[str, str]]) -> None:
    (first, expected), *others = values
    for name, value in others:
        if value != expected:
            raise UsageError(
                f"Only runs of the same {what} can be compared, but {first} has {expected!r} and {name} has {value!r}. "
                "Compare them separately."
            )


def _metrics(run: Run) -> Iterable[str]:
    return (f"{task} {name}" for task in sorted(run.results) for name in sorted(run.results[task]))


def _common_metric(run: Run) -> str | None:
    # The first by the tasks' own order; all tasks must mean the same thing by it.
    first = {next(iter(metrics), "") for metrics in run.results.values()}
    return first.pop() or None if len(first) == 1 else None


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


def _ratio(count: float, reference: float) -> float | None:
    return count / reference if reference else None
