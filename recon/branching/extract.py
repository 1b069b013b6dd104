"""extract_task: take one task's plain model out of a branched one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recon.branching.fans.trees import value_for
from recon.branching.modules.branched import LoadBareParameter
from recon.branching.modules.hooks import SplitOutputs, TasksOnly
from recon.branching.modules.rotations import refuse_rotations
from recon.branching.modules.statistics import load_buffers
from recon.branching.plan import plan_of
from recon.branching.surgery.copies import copy_model
from recon.branching.surgery.task_view import TaskView
from recon.errors import FanError, PlanError
from recon.support.network.references import STRUCTURE
from recon.support.network.trees import leaves_of, map_tree


def extract_task(branched: nn.Module, task: str) -> nn.Module:
    """The plain original architecture with one task's copies; its `state_dict` loads into the user's own class.

    Its output still has an entry for every task, but only this task's entry is meaningful.

    Raises:
        PlanError: the model is not branched, or has no such task.
        UsageError: the model holds RotoGrad's rotations.
    """
    plan = plan_of(branched)
    if task not in plan.tasks:
        raise PlanError(f"There is no task {task!r} in this model; its tasks are {list(plan.tasks)}.")
    refuse_rotations(branched)
    view = TaskView(branched, task).network
    for surgical in ("branch_plan", "forward"):
        if surgical in vars(view) and (surgical != "forward" or plan.mode == "per-task"):
            delattr(view, surgical)
    for part in view.modules():
        for attribute, value in vars(part).items():
            if attribute not in STRUCTURE and any(isinstance(leaf, Tensor) for leaf in leaves_of(value)):
                vars(part)[attribute] = _kept_for(value, task)
    plain = copy_model(view)
    for part in plain.modules():
        _drop_hooks(part)
    return plain


def _kept_for(value: Any, task: str) -> Any:
    """What the last forward left in an attribute, for one task and detached from the graph."""
    try:
        value = value_for(value, task)
    except FanError:  # its module serves other tasks
        return None
    return map_tree(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and not leaf.is_leaf else leaf, value)


def _drop_hooks(module: nn.Module) -> None:
    """Remove the hooks that `convert` added."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps the hooks that it calls before loading
            if hook is load_buffers or isinstance(hook, (SplitOutputs, TasksOnly, LoadBareParameter)):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
