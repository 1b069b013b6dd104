"""What `recon train` prints of a run at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from recon.experiments import Run, Training
from recon.experiments.training.evaluations import Record
from recon.experiments.training.run_folder import BEST, METRICS_FILE, PICTURE_FILE
from recon.support import launch
from recon.support.tables import metric_text, short_number, text_table
from recon.training.recorder import mean_weights, read_records
from recon_cli.parser import Report

_CHANGE = 1e-6  # of a weight, relative: less is rounding
_LARGEST = 100.0  # of a static weight that is worth trying: it multiplies the learning rate of all that its task trains


def report(job: Training, run: Run) -> Report:
    """The results of the last and of the best epochs, what the run costs, and the weights of its tasks."""
    best = _best_records(job, run)
    weights, picture = ({}, None) if run.is_single_task or launch.number() else _weights(job, run)
    other = "joint" if run.is_single_task else "single"
    option = static_option(weights, run.tasks)
    text = [
        f"{run.label}: epochs {run.epochs}, seed {run.seed}",
        "",
        _results_table(run, best),
        "",
        f"{short_number(run.parameters)} parameters, {short_number(run.macs)} multiply-adds per sample, "
        f"{1000 * run.seconds_per_step:.1f} ms a step.",
    ]
    if picture:
        text += [f"The tasks' weights, step by step: {picture}."]
    if picture and option:
        text += ["Their mean, as static weights:", f"  --method {option}"]
    best_folders = " and ".join(str(folder / BEST) for folder in job.folders.values())
    text += [
        f"Saved {job.folder}; the best epoch's model is in {best_folders}. Next, compare it with other runs, as in:",
        f"  {shlex.join(['recon', 'compare', other, str(job.folder)])}",
    ]
    data = {
        "folder": str(job.folder),
        **run.as_dict(),
        "best": {task: {"epoch": r["number"], "results": r["results"][task]} for task, r in best.items()},
        "mean_weights": weights,
        "static_weights": option,
    }
    return Report("\n".join(text), data)


def static_option(weights: Mapping[str, float], tasks: Sequence[str]) -> str | None:
    """The method that trains with these weights; None where a task has none, or one that is too large to train with."""
    listed = [f"{weights[task]:.4g}" for task in tasks if task in weights]
    sound = [0 <= float(weight) <= _LARGEST for weight in listed]
    if len(listed) < len(tasks) or not all(sound) or not any(map(float, listed)):
        return None
    return f"joint:weights={'/'.join(listed)}"


def _best_records(job: Training, run: Run) -> dict[str, Record]:
    """`{task: its model's best epoch}`."""
    best: dict[str, Record] = {}
    for tasks in [[task] for task in run.tasks] if run.is_single_task else [run.tasks]:
        history = [record for record in run.history if set(tasks) & set(record["losses"])]
        found = job.evaluations.best(history, run.higher_is_better)
        best |= {} if found is None else dict.fromkeys(tasks, found)
    return best


def _results_table(run: Run, best: Mapping[str, Record]) -> str:
    rows = []
    for task, metrics in run.results.items():
        record = best[task]
        for name, value in metrics.items():
            rows.append([task, name, metric_text(value), _text(record["results"][task][name]), str(record["number"])])
    return text_table(["task", "metric", f"last (epoch {run.epochs})", "best", "(epoch)"], rows, left=2)


def _text(value: float | None) -> str:
    return "nan" if value is None else metric_text(value)


def _weights(job: Training, run: Run) -> tuple[dict[str, float], str | None]:
    """The mean weights of the tasks, and the file of their picture if they change."""
    path = job.folder / METRICS_FILE
    records = read_records(path) if path.exists() else []
    means = mean_weights(records, run.tasks)
    if not any(_varies(records, task) for task in means):
        return means, None
    from recon.experiments.pictures import weights_over_steps  # late: matplotlib takes its time

    picture = job.folder / PICTURE_FILE
    weights_over_steps(records, list(means), picture)
    return means, str(picture)


def _varies(records: Sequence[Mapping[str, Any]], task: str) -> bool:
    weights = [record["weights"].get(task) for record in records if "step" in record]
    found = [weight for weight in weights if weight is not None]
    return bool(found) and max(found) - min(found) > _CHANGE * max(map(abs, found))
