"""Run: the record of a training run, and the file that keeps it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recon.errors import CheckpointError
from recon.support.files.documents import Document, json_values, read_document, shown
from recon.support.files.folders import finish_replacing
from recon.support.files.whole import write_text

RUN_FILE = "run.json"
FORMAT = "recon run"
VERSION = 1
SINGLE_TASK = "single-task"
"""The method of a run that trained one model for each task: the baselines of Δm."""

_MOST_SEED = 2**32 - 1


@dataclass
class Run:
    """What was trained, how, how well it does and what it costs.

    Args:
        problem: the problem's name.
        label: what tables call the run: "joint", "pcgrad + Recon K=8", "single-task".
        tasks: the problem's tasks.
        method: the gradient method; `SINGLE_TASK` for one model per task; empty while nothing was trained.
        surgery: how the branched layers were chosen ("Recon K=8", "random K=8"); empty for a plain model.
        branched_layers: their names.
        seed: of the model's initialisation and the loaders.
        epochs: how many were asked for.
        parameters: of the model, or of all single-task models together.
        macs: forward multiply-adds per sample; of all single-task models together.
        seconds_per_step: mean wall time of a training step, loading included; single-task steps added up.
        results: `{task: {metric: value}}` on the test data; empty until the run is finished.
        higher_is_better: `{task: {metric: direction}}`.
        history: the epochs' records (`recon.Epoch`), as plain values.
        finished: whether all epochs and the evaluation were done.
        versions: of recon, Python and torch.
        backbone: the network, if it is not the problem's own, as `--backbone` names it.
        settings: the command's other options, by name.
    """

    problem: str
    label: str
    tasks: tuple[str, ...]
    method: str
    surgery: str = ""
    branched_layers: tuple[str, ...] = ()
    seed: int = 0
    epochs: int = 0
    parameters: int = 0
    macs: int = 0
    seconds_per_step: float = 0.0
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    higher_is_better: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    versions: dict[str, str] = field(default_factory=lambda: versions())
    backbone: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_single_task(self) -> bool:
        """Whether this run trained one model for each task."""
        return self.method == SINGLE_TASK

    @property
    def is_plain(self) -> bool:
        """Whether this run trained one model without branched layers."""
        return not self.is_single_task and not self.branched_layers

    def as_dict(self) -> dict[str, Any]:
        """The run as plain JSON values: a number that is not finite becomes null."""
        return json_values(asdict(self))

    def save(self, folder: str | Path) -> None:
        """Write `run.json` into the folder, atomically.

        Raises:
            UsageError: the folder cannot be written to.
        """
        document = {"format": FORMAT, "version": VERSION, **self.as_dict()}
        write_text(Path(folder) / RUN_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read what `save` wrote.

        Args:
            folder: the run's folder, or its `run.json`.

        Raises:
            CheckpointError: missing, truncated, of an unknown version, or with a wrong field.
        """
        path = Path(folder)
        path = path if path.name == RUN_FILE else path / RUN_FILE
        finish_replacing(path.parent)
        if not path.exists():
            raise CheckpointError(
                f"{path.parent} holds no {RUN_FILE}, so it is not a run. Pass the folder that `recon train` wrote."
            )
        document = read_document(path, CheckpointError, "Train again with `recon train`.")
        document.check_format(FORMAT, VERSION)
        tasks, finished = document.names("tasks", least=1), document.flag("finished")
        return cls(
            problem=document.text("problem"),
            label=document.text("label"),
            tasks=tasks,
            method=document.text("method"),
            surgery=document.text("surgery"),
            branched_layers=document.names("branched_layers"),
            seed=document.integer("seed", most=_MOST_SEED),
            epochs=document.integer("epochs"),
            parameters=document.integer("parameters"),
            macs=document.integer("macs"),
            seconds_per_step=document.number_or_nan("seconds_per_step", least=0),
            results=_by_task(document, "results", tasks, finished, Document.number_or_nan),
            higher_is_better=_by_task(document, "higher_is_better", tasks, finished, Document.flag),
            history=[_epoch(entry) for entry in document.tables("history")],
            finished=finished,
            versions=_each(document.table("versions"), Document.text),
            # Records of before have neither.
            backbone=document.text("backbone") if "backbone" in document else "",
            settings=document.get("settings", dict) if "settings" in document else {},
        )


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"recon": version("recon-mtl"), "python": platform.python_version(), "torch": version("torch")}


def _epoch(entry: Document) -> dict[str, Any]:
    """A record of the history: `recon.Epoch` as plain values, of which older records have some only."""
    entry.integer("number", least=1)
    entry.values["losses"] = _each(entry.table("losses"), Document.number_or_nan)
    for key in ("steps", "skipped"):
        if key in entry:
            entry.integer(key)
    if "seconds" in entry:
        entry.number_or_nan("seconds", least=0)
    if "weights" in entry:
        entry.values["weights"] = _each(entry.table("weights"), Document.number_or_nan)
    if "results" in entry:
        results = entry.table("results")
        entry.values["results"] = {task: _each(results.table(task), Document.number_or_nan) for task in results}
    return dict(entry.values)


def _by_task(
    document: Document, key: str, tasks: Sequence[str], finished: bool, read: Callable[[Document, str], Any]
) -> dict[str, dict[str, Any]]:
    """`{task: {metric: value}}` for the run's tasks; empty is allowed while the run is not finished."""
    table = document.table(key)
    if set(table) != set(tasks) and (table.values or finished):
        document.wrong(key, f"is for the tasks {shown(list(table))}, not {shown(list(tasks))}")
    return {task: _each(table.table(task), read) for task in table}


def _each(table: Document, read: Callable[[Document, str], Any]) -> dict[str, Any]:
    if "" in table:
        table.wrong("", "has no name")
    return {key: read(table, key) for key in table}
