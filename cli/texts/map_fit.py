"""How a conflict map fits the problem: shown on stderr before the work, and in the report of `recon convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.support.tables import counted
from recon_cli.terminal import tell

if TYPE_CHECKING:
    from torch import nn

    from recon import ConflictMap, Problem
    from recon.plans import Match


def match_map(cmap: ConflictMap, problem: Problem, model: nn.Module, rename: Mapping[str, str]) -> Match:
    """Match the map to the model, and say on stderr what does not fit."""
    from recon.plans import match  # late: it imports torch

    found = match(cmap, model, rename)
    notes = found.warnings()
    if set(cmap.tasks) != set(problem.task_names):
        notes.append(f"The map was made for {_tasks(cmap)}; the copies are for {', '.join(problem.task_names)}.")
    for note in notes:
        tell(f"note: {note}")
    return found


def fit_line(path: Path, found: Match) -> str:
    """One line on how the map fits."""
    return (
        f"Map {path}, made for {_tasks(found.cmap)}: {counted(len(found.matched), 'layer')} matched, "
        f"{len(found.missing)} missing from the model, {len(found.changed)} with other shapes there."
    )


def fit_data(path: Path, found: Match) -> dict[str, Any]:
    """The same in full, for --json."""
    return {
        "file": str(path),
        "tasks": found.cmap.tasks,
        "matched": found.matched,
        "missing": found.missing,
        "changed": found.changed,
    }


def _tasks(cmap: ConflictMap) -> str:
    return f"the tasks {', '.join(cmap.tasks)}" if cmap.tasks else "tasks that it does not name"
