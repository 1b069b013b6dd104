"""recon: find the layers where the tasks of a multi-task network fight, and give each task its own copy.

The public names are imported on first use: `import recon` is instant, torch comes with the first call that needs it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon import errors, methods
    from recon.batches import inputs
    from recon.branch_plan import BranchPlan
    from recon.checkpoint import load, save
    from recon.conflict_map import ConflictMap
    from recon.costs import Costs, costs
    from recon.evaluation import delta_m, evaluate
    from recon.extract import extract_task
    from recon.history import Epoch, History
    from recon.lowering import lower
    from recon.planning import plan
    from recon.problem import Metric, Problem, Search, Task
    from recon.profiler import Profiler
    from recon.recorder import Recorder
    from recon.surgery import convert
    from recon.trainer import train
    from recon.updates import backward
    from recon.verification import Verification, verify
    from recon.warm_up import profile

__all__ = [
    "BranchPlan",
    "ConflictMap",
    "Costs",
    "Epoch",
    "History",
    "Metric",
    "Problem",
    "Profiler",
    "Recorder",
    "Search",
    "Task",
    "Verification",
    "backward",
    "convert",
    "costs",
    "delta_m",
    "errors",
    "evaluate",
    "extract_task",
    "inputs",
    "load",
    "lower",
    "methods",
    "plan",
    "profile",
    "save",
    "train",
    "verify",
]

_HOME = {
    "BranchPlan": "branch_plan",
    "ConflictMap": "conflict_map",
    "Costs": "costs",
    "Epoch": "history",
    "History": "history",
    "Metric": "problem",
    "Problem": "problem",
    "Profiler": "profiler",
    "Recorder": "recorder",
    "Search": "problem",
    "Task": "problem",
    "Verification": "verification",
    "backward": "updates",
    "convert": "surgery",
    "costs": "costs",
    "delta_m": "evaluation",
    "evaluate": "evaluation",
    "extract_task": "extract",
    "inputs": "batches",
    "load": "checkpoint",
    "lower": "lowering",
    "plan": "planning",
    "profile": "warm_up",
    "save": "checkpoint",
    "train": "trainer",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("recon-mtl")
    if name in ("errors", "methods"):
        return importlib.import_module(f"recon.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"recon.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing a submodule binds it to its package's attribute: `recon.costs` must stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
