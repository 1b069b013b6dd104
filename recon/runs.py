"""Run: the record of a training run, and the file that keeps it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recon.errors import CheckpointError
from recon.files import write_text
from recon.replacing import finish_replacing

RUN_FILE = "run.json"
FORMAT = "recon run"
VERSION = 1
SINGLE_TASK = "single-task"
"""The method of a run that trained one model for each task: the baselines of Δm."""

_NUMBER = (int, float)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "problem": str,
    "label": str,
    "tasks": list,
    "method": str,
    "surgery": str,
    "branched_layers": list,
    "seed": int,
    "epochs": int,
    "parameters": int,
    "macs": int,
    "seconds_per_step": _NUMBER,
    "results": dict,
    "higher_is_better": dict,
    "history": list,
    "finished": bool,
    "versions": dict,
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {"backbone": str, "settings": dict}


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
        document = _parse(path)
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            if document.get(name) != expected:
                raise _wrong(path, f"field {name!r} is {document.get(name)!r}, not {expected!r}")
        for name, kind in _TYPES.items():
            _check_type(path, document, name, kind)
        for name in _OPTIONAL.keys() & document.keys():
            _check_type(path, document, name, _OPTIONAL[name])
        for name in ("tasks", "branched_layers"):
            if not all(isinstance(entry, str) for entry in document[name]):
                raise _wrong(path, f"field {name!r} is not a list of names")
            document[name] = tuple(document[name])
        document["results"] = _by_task(path, document, "results", _NUMBER)
        document["higher_is_better"] = _by_task(path, document, "higher_is_better", bool)
        return cls(**{f.name: document[f.name] for f in fields(cls) if f.name in document})


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"recon": version("recon-mtl"), "python": platform.python_version(), "torch": version("torch")}


def json_values(value: Any) -> Any:
    """The same nest of dicts and lists with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent} holds no {RUN_FILE}, so it is not a run. Pass the folder that `recon train` wrote."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise _wrong(path, f"not whole JSON ({error}); the file may be truncated") from error
    if not isinstance(document, dict):
        raise _wrong(path, f"holds a {type(document).__name__}, not one JSON object")
    return document


def _check_type(path: Path, document: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> None:
    if name not in document:
        raise _wrong(path, f"field {name!r} is missing")
    value = document[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(path, f"field {name!r} has the wrong type ({type(value).__name__})")


def _by_task(
    path: Path, document: Mapping[str, Any], name: str, kind: type | tuple[type, ...]
) -> dict[str, dict[str, Any]]:
    """`{task: {metric: value}}` for the run's tasks; empty is allowed while the run is not finished."""
    table = document[name]
    if set(table) != set(document["tasks"]) and (table or document["finished"]):
        raise _wrong(path, f"field {name!r} is for the tasks {list(table)}, not {list(document['tasks'])}")
    checked: dict[str, dict[str, Any]] = {}
    for task, metrics in table.items():
        checked[task] = {}
        for metric, value in metrics.items() if isinstance(metrics, dict) else [("", metrics)]:
            value = math.nan if value is None and kind is _NUMBER else value
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not metric:
                raise _wrong(path, f"field {name!r} has no usable value for task {task!r}")
            checked[task][metric] = value
    return checked


def _wrong(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}. Train again with `recon train`.")
