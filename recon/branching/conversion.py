"""convert: give each group of tasks its own copy of the layers that a plan names."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from recon.branching.modules.hooks import SplitOutputs, TasksOnly
from recon.branching.modules.rotations import refuse_rotations
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan, Mode, checked_mode
from recon.branching.surgery.copies import branch_layers, copy_model, split_statistics
from recon.branching.surgery.dry_run import find_statistics, find_task_modules, refuse_foreign
from recon.branching.surgery.initial import Init, draw_copies, initialise
from recon.branching.surgery.per_task import PerTaskForward, find_statistics_by_value, refuse_repeated_writes
from recon.branching.verification import verify as check
from recon.errors import PlanError, UsageError
from recon.support.network.forward import fresh, run
from recon.support.network.layers import module_at, unwrapped
from recon.support.network.state import state_kept
from recon.support.network.task_layers import wasted_copies
from recon.support.network.trainable import refuse_sharded

logger = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    plan: BranchPlan,
    example_inputs: Any = None,
    *,
    mode: Mode | None = None,
    init: Init = "copy",
    copies: Literal["equal", "independent"] = "equal",
    verify: bool = False,
) -> nn.Module:
    """Give the task groups of `plan` their own copies of its layers.

    The result is a copy of `model`. For every task, its output equals that of the original architecture with the
    task's copies. `model` itself is left untouched.

    Args:
        model: `model(inputs) -> {task name: output}`.
        plan: which layers, and which groups of tasks.
        example_inputs: a small batch of inputs (two samples or more), on the model's device; `recon.inputs(...)` for
            a forward of several arguments. Dry forwards find the layers whose running statistics must follow the
            fan, and the modules that serve one task only. Not needed when the plan lists them already (a plan of a
            branched or loaded model).
        mode: `fan`, the usual one, runs the forward once: a branched layer returns a task fan, over which every later
            operation maps, and everything before it runs once. `per-task` runs the whole network once per task,
            for a forward that cannot work on fans; parameters, state and results are the same. Default: the
            plan's mode.
        init: the weights to start from. `copy`: the model's own, so that no output changes. `scratch`: every layer
            draws new ones (its `reset_parameters`). A function that makes a fresh model: that model's. A checkpoint
            of the unbranched model (a `state_dict`, a file of one, a folder that `recon.save` wrote): its weights.
        copies: whether the copies of one layer start `equal`, or `independent`, each with newly drawn
            weights; the latter needs `init` to be `scratch` or a function.
        verify: check the result by `recon.verify` on the example inputs, and log the largest difference.

    Raises:
        UnknownNameError: the plan names a layer that the model does not have.
        PlanError: the model is branched already.
        UsageError: the model is wrapped (DDP, compiled, scripted), sharded over processes, cannot be copied or run, or
            holds RotoGrad's rotations; or an option is wrong.
        CheckpointError: `init` is a checkpoint that cannot be read, or of another architecture.
        FanError: the forward has a statement that cannot work on values that differ between tasks.
        VerificationError: with `verify`, an output or gradient is not what it must be.
    """
    if not isinstance(plan, BranchPlan):
        raise PlanError(f"The plan is a {type(plan).__name__}. The order is convert(model, plan, example_inputs).")
    refuse_model(model)
    if (plan.statistics is None or verify) and example_inputs is None:
        raise UsageError("convert needs example_inputs: a small batch of inputs, as the model's forward expects them.")
    plan = plan.on(model)
    plan = replace(plan, mode=checked_mode(mode or plan.mode))
    branched = copy_model(model)
    initialise(branched, init)
    branch_layers(branched, plan.layers)
    draw_copies(branched, model, init, copies)
    form = _per_task_form if plan.mode == "per-task" else _fan_form
    branched = form(model, branched, plan, example_inputs)
    if plan.statistics is None:
        _warn_of_missing_tasks(model, plan, example_inputs)
        for note in wasted_copies(model, plan.layers, plan.tasks, fresh(example_inputs)):
            logger.warning("%s", note)
    if verify:
        logger.info("%s", check(model, branched, example_inputs))
    return branched


def _warn_of_missing_tasks(model: nn.Module, plan: BranchPlan, example_inputs: Any) -> None:
    with state_kept(model), torch.no_grad():
        others = [name for name in run(model.eval(), fresh(example_inputs)) if name not in plan.tasks]
    if others:
        logger.warning(
            "The model's output also has %s, which the branched model leaves out: the plan's tasks are %s. Make the "
            "plan with all tasks to keep them.",
            ", ".join(map(repr, others)),
            ", ".join(map(repr, plan.tasks)),
        )


def _fan_form(model: nn.Module, branched: nn.Module, plan: BranchPlan, example_inputs: Any) -> nn.Module:
    if plan.statistics is None:
        _refuse_meta(branched)
        plan = replace(plan, statistics=_follow_fans(branched, example_inputs))
    else:
        split_statistics(branched, plan.statistics)
    branched.register_forward_hook(SplitOutputs(plan.tasks))
    if plan.task_modules is None:
        plan = replace(plan, task_modules=find_task_modules(branched, plan.tasks, example_inputs, original=model))
    for path, tasks in (plan.task_modules or {}).items():
        module_at(branched, path).register_forward_pre_hook(TasksOnly(tasks), with_kwargs=True)
    branched.branch_plan = plan  # type: ignore[assignment]
    return branched


def _follow_fans(branched: nn.Module, example_inputs: Any) -> dict[str, Partition]:
    """Split the statistics that differ between tasks, then those that differ only because of this split."""
    statistics: dict[str, Partition] = {}
    while True:
        found = find_statistics(branched, example_inputs)
        new = {path: partition for path, partition in found.items() if path not in statistics}
        if not new:
            return statistics
        split_statistics(branched, new)
        statistics |= new


def _per_task_form(model: nn.Module, branched: nn.Module, plan: BranchPlan, example_inputs: Any) -> nn.Module:
    found = plan.statistics is not None
    if not found:
        _refuse_meta(branched)
        plan = replace(plan, statistics=find_statistics_by_value(branched, plan.tasks, example_inputs))
    split_statistics(branched, plan.statistics or {})
    if not found:
        refuse_repeated_writes(branched, plan.tasks, example_inputs)
    branched.forward = PerTaskForward(branched, plan.tasks)
    branched.branch_plan = replace(plan, task_modules={})  # type: ignore[assignment]
    if not found:
        for training in (True, False):
            with state_kept(branched), torch.enable_grad():
                refuse_foreign(run(branched.train(training), fresh(example_inputs)), model)
    return branched


def refuse_model(model: nn.Module) -> None:
    """Fail on a model that is branched already, wrapped or sharded over processes, or holds RotoGrad's rotations."""
    _refuse_wrapped(model)
    refuse_sharded(model)
    if hasattr(model, "branch_plan"):
        raise PlanError("The model is branched already. Convert the unbranched model, with a plan of all the layers.")
    refuse_rotations(model)


def _refuse_wrapped(model: nn.Module) -> None:
    if unwrapped(model) is not model or isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"The model is wrapped in {type(model).__name__}. Convert the plain module inside (model.module, or the "
            "model before torch.compile), then wrap the result."
        )


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("convert runs the model, but its parameters are on the meta device. Load weights first.")
