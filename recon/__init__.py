"""recon: find the layers where the tasks of a multi-task network fight, and give each task its own copy.

The public names are imported on first use: `import recon` is instant, torch comes with the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon import branching, errors, experiments, maps, methods, models, plans, problems, profiling, training
    from recon.branching import BranchPlan, Verification, convert, extract_task, load, lower, save, verify
    from recon.experiments import CheckReport, check
    from recon.maps import ConflictMap
    from recon.methods import Window, backward
    from recon.plans import Costs, costs, plan
    from recon.problems import Metric, Problem, Search, Task
    from recon.profiling import Profiler, profile
    from recon.support.network.forward import inputs
    from recon.support.network.outputs import name_outputs
    from recon.training import Epoch, History, Recorder, delta_m, evaluate, joint_loader, train

__all__ = [
    "BranchPlan",
    "CheckReport",
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
    "Window",
    "backward",
    "branching",
    "check",
    "convert",
    "costs",
    "delta_m",
    "errors",
    "evaluate",
    "experiments",
    "extract_task",
    "inputs",
    "joint_loader",
    "load",
    "lower",
    "maps",
    "methods",
    "models",
    "name_outputs",
    "plan",
    "plans",
    "problems",
    "profile",
    "profiling",
    "save",
    "train",
    "training",
    "verify",
]

if not TYPE_CHECKING:  # the type checker must not take every name for a public one
    _public, __dir__ = lazy_face(
        __name__,
        {
            "BranchPlan": "branching",
            "CheckReport": "experiments",
            "ConflictMap": "maps",
            "Costs": "plans",
            "Epoch": "training",
            "History": "training",
            "Metric": "problems",
            "Problem": "problems",
            "Profiler": "profiling",
            "Recorder": "training",
            "Search": "problems",
            "Task": "problems",
            "Verification": "branching",
            "Window": "methods",
            "backward": "methods",
            "branching": "branching",
            "check": "experiments",
            "convert": "branching",
            "costs": "plans",
            "delta_m": "training",
            "errors": "errors",
            "evaluate": "training",
            "experiments": "experiments",
            "extract_task": "branching",
            "inputs": "support.network.forward",
            "joint_loader": "training",
            "load": "branching",
            "lower": "branching",
            "maps": "maps",
            "methods": "methods",
            "models": "models",
            "name_outputs": "support.network.outputs",
            "plan": "plans",
            "plans": "plans",
            "problems": "problems",
            "profile": "profiling",
            "profiling": "profiling",
            "save": "branching",
            "train": "training",
            "training": "training",
            "verify": "branching",
        },
    )

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version  # late: it takes longer than all the rest of `import recon`

            return version("recon-mtl")
        return _public(name)
