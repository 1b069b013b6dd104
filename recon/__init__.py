"""recon: find the layers where the tasks of a multi-task network fight, and give each task its own copy."""

from recon import errors, methods
from recon.checkpoint import load, save
from recon.conflict_map import ConflictMap
from recon.costs import Costs, costs
from recon.evaluation import delta_m, evaluate
from recon.planning import BranchPlan, plan
from recon.problem import Metric, Problem, Task
from recon.profiler import Profiler, profile
from recon.surgery import convert, extract_task
from recon.trainer import Epoch, History, train
from recon.updates import backward

__all__ = [
    "BranchPlan",
    "ConflictMap",
    "Costs",
    "Epoch",
    "History",
    "Metric",
    "Problem",
    "Profiler",
    "Task",
    "backward",
    "convert",
    "costs",
    "delta_m",
    "errors",
    "evaluate",
    "extract_task",
    "load",
    "methods",
    "plan",
    "profile",
    "save",
    "train",
]
