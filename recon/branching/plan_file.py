"""Write a branch plan as readable JSON, and read one with every field checked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan, checked_mode
from recon.errors import CheckpointError, PlanError
from recon.support.files.documents import Document, parse_document

FORMAT = "recon branch plan"
VERSION = 1
REMEDY = "Convert and save the model again."


def plan_to_json(plan: BranchPlan) -> str:
    """A plan as readable JSON."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tasks": list(plan.tasks),
        "mode": plan.mode,
        "layers": {name: _groups(partition) for name, partition in plan.layers.items()},
        "statistics": {path: _groups(partition) for path, partition in (plan.statistics or {}).items()},
        "task_modules": {path: list(tasks) for path, tasks in (plan.task_modules or {}).items()},
    }
    head = [f" {json.dumps(key)}: {json.dumps(document[key])}" for key in ("format", "version", "tasks", "mode")]
    tables = [f" {json.dumps(key)}: {_table(document[key])}" for key in ("layers", "statistics", "task_modules")]
    return "{\n" + ",\n".join(head + tables) + "\n}\n"


def plan_from_json(text: str, source: str) -> BranchPlan:
    """Read a plan; `source` names it in errors."""
    document = parse_document(text, source, CheckpointError, REMEDY)
    document.check_format(FORMAT, VERSION)
    tasks = document.names("tasks", least=2)
    layers, statistics, modules = (document.table(key) for key in ("layers", "statistics", "task_modules"))
    try:
        plan = BranchPlan(tasks, {name: _partition(layers, name, tasks, least=2) for name in layers})
    except PlanError as error:
        document.fail(f"field 'layers': {error}")
    try:
        mode = checked_mode(document.text("mode"))
    except PlanError as error:
        document.fail(f"field 'mode': {error}")
    return replace(
        plan,
        # A module that only some tasks reach has statistics of these tasks only.
        statistics={path: _partition(statistics, path, tasks, partial=True) for path in statistics},
        task_modules={path: _some_tasks(modules, path, tasks) for path in modules},
        mode=mode,
    )


def _partition(
    table: Document, name: str, tasks: tuple[str, ...], *, least: int = 1, partial: bool = False
) -> Partition:
    """The groups of a field: lists of tasks, each task in one of them."""
    groups = table.get(name, list)
    if not all(isinstance(group, list) and group and all(isinstance(task, str) for task in group) for group in groups):
        table.wrong(name, "is not a list of groups of tasks")
    named = {task for group in groups for task in group}
    try:
        partition = Partition.of_groups(groups, [task for task in tasks if not partial or task in named])
    except PlanError as error:
        table.wrong(name, f"does not fit the tasks: {error}")
    if len(groups) < least:
        table.wrong(name, f"has {len(groups)} group(s), but a branched layer has at least {least}")
    return partition


def _some_tasks(table: Document, name: str, tasks: tuple[str, ...]) -> tuple[str, ...]:
    served = table.names(name)
    if not set(served) <= set(tasks):
        table.wrong(name, f"names tasks that are not among {', '.join(tasks)}")
    return served


def _groups(partition: Partition) -> list[list[str]]:
    return [list(group) for group in partition.groups]


def _table(entries: dict[str, Any]) -> str:
    if not entries:
        return "{}"
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()) + "\n }"
