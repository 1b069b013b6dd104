"""The models and the records that runs leave in their folders. Imports torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import nn

from recon import branching, models
from recon.errors import CheckpointError, UsageError
from recon.experiments.backbones import is_own, with_backbone
from recon.experiments.inputs import make_model
from recon.experiments.run import RUN_FILE, Run
from recon.problems.problem import Problem
from recon.support.files.documents import shown
from recon.support.files.folders import finish_replacing

_MOST_LETTERS = 300  # of a name that a message shows to be copied


def load_model(problem: Problem, folder: Path, seed: int) -> tuple[nn.Module, Run | None]:
    """A saved model of this problem and backbone on the CPU, and its record if it has one."""
    record = read_record(problem, folder)
    if record is not None and record.is_single_task:
        one = task_folder(folder, record.tasks[0])
        raise UsageError(f"{folder} holds one model for each task. Pass one of them, such as {one}.")
    return branching.load(folder, make_model(as_recorded(problem, record, folder), seed)), record


def read_record(problem: Problem, folder: Path) -> Run | None:
    """The record of the run in a folder; None for a model that was saved without one."""
    finish_replacing(folder)
    if not (folder / RUN_FILE).exists():
        return None
    record = Run.load(folder)
    if record.problem != problem.name:
        raise CheckpointError(
            f"{folder} is a run of the problem {record.problem!r}, not of {problem.name!r}. Name that problem, or pass "
            "another folder."
        )
    return record


def as_recorded(problem: Problem, record: Run | None, folder: Path) -> Problem:
    """The problem with the network of the model in a folder.

    A record is no reason to import anything: of recon's own networks it names one; a network of the user's, the user
    names.
    """
    if record is None or record.backbone == problem.backbone:
        return problem
    own = is_own(record.backbone)
    if problem.backbone and not (own and is_own(problem.backbone)):
        raise UsageError(
            f"The backbone {problem.backbone} does not fit {folder}, whose model is {_network(record.backbone)}. "
            "Leave the backbone out, or pass another folder."
        )
    if problem.backbone:  # the file may lie elsewhere on this machine; the weights show whether it fits
        return problem
    if own:
        raise UsageError(
            f"The model in {folder} was made by {shown(record.backbone)}, which is not part of recon. Recon does not "
            "run code because a file names it. If you trust this code, name it yourself: "
            f"{_backbone_option(record.backbone)} (in Python, with_backbone(problem, ...))."
        )
    if record.backbone not in models.__all__:
        raise CheckpointError(
            f"{folder / RUN_FILE}: field 'backbone' is {shown(record.backbone)}, but recon has no such network. "
            "Train again with `recon train`."
        )
    return with_backbone(problem, record.backbone)


def _network(backbone: str) -> str:
    known = backbone in models.__all__
    return backbone if known else shown(backbone) if backbone else "the problem's own network"


def _backbone_option(backbone: str) -> str:
    """What to type for a recorded network, if it can be typed."""
    plain = backbone.isprintable() and len(backbone) <= _MOST_LETTERS
    return f"--backbone {shlex.quote(backbone) if plain else 'path/to/file.py:function'}"


def task_folder(folder: Path, task: str) -> Path:
    """Where a single-task run keeps a task's model."""
    return folder / task.replace("/", "_")
