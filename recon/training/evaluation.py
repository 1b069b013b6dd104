"""How well a model does its tasks, and how that compares with one model for each task."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from recon.errors import ProblemError, UsageError
from recon.problems.problem import Task
from recon.support.loaders import every_batch_once
from recon.support.network.forward import Batch, batch_parts, model_device, task_outputs, tasks_of, to_device

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState

logger = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, float]]
"""`{task name: {metric name: value}}`."""

LOSS = "loss"
"""What the results call the mean loss of a task that has no metrics; lower is better."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is back in the mode it had, frozen norms included."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate(
    model: nn.Module, loader: Iterable[Batch], tasks: Sequence[Task], *, across_ranks: bool = True
) -> dict[str, dict[str, float]]:
    """The metrics of every task over a whole loader.

    Runs on the model's device, in evaluation mode and without gradients. A task is skipped in batches that
    lack its target. A task without metrics reports its loss as `"loss"`: the mean over batches, each weighted
    by its number of targets.

    Args:
        model: `model(inputs) -> {task name: output}`.
        loader: yields `(inputs, {task name: target})` or `{task name: (inputs, target)}`. Of a `recon.joint_loader`,
            each task's loader is gone through once, whatever its length, so that every sample counts once.
        tasks: the tasks to evaluate; the model and the loader may know more of them.
        across_ranks: where several processes train together, let torchmetrics combine the counts of all, each of which
            must call this with a loader for its own part of the data. Otherwise each evaluates by itself.

    Returns:
        `{task name: {metric name: value}}`.

    Raises:
        ProblemError: a batch or the model's output has the wrong form, a task never had a target, or a metric
            is not a single number.
    """
    device = model_device(model)
    states = {task.name: _accumulators(task, device, across_ranks) for task in tasks}
    by_name = {task.name: task for task in tasks}
    seen: set[str] = set()
    keys: dict[str, None] = {}
    with eval_mode(model), torch.no_grad():
        for part in (part for batch in every_batch_once(loader) for part in batch_parts(batch)):
            keys.update(dict.fromkeys(part.targets))
            labelled = tasks_of(part, by_name)
            if not labelled:
                continue
            inputs, targets = to_device(part, device)
            outputs = task_outputs(model, inputs, labelled)
            seen.update(t for t in labelled if _update(states[t], by_name[t], outputs[t], targets[t]))
    unlabelled = [task.name for task in tasks if task.name not in seen]
    if unlabelled:
        raise ProblemError(
            f"No batch had a target for task {', '.join(map(repr, unlabelled))}; the loader's targets were "
            f"{', '.join(map(repr, keys)) or 'none at all'}. The names in a batch must be the tasks' names."
        )
    results = {
        task: {name: _number(state, task, name) for name, state in metrics.items()} for task, metrics in states.items()
    }
    spoilt = [task for task, metrics in results.items() if math.isnan(metrics.get(LOSS, 0.0)) and LOSS in states[task]]
    if spoilt:
        logger.warning(
            "The mean loss of %s is NaN. A single batch can do that, such as one without any label (0 / 0). Leave the "
            "target out of such a batch, or make it None.",
            spoilt,
        )
    return results


def directions(tasks: Sequence[Task]) -> dict[str, dict[str, bool]]:
    """`{task name: {metric name: higher is better}}` for what `evaluate` reports, as `delta_m` takes it."""
    return {
        task.name: {metric.name: metric.higher_is_better for metric in task.metrics} or {LOSS: False} for task in tasks
    }


def delta_m(
    results: Results, baselines: Results, higher_is_better: Mapping[str, Mapping[str, bool]] | Mapping[str, bool]
) -> float:
    """Δm: the mean relative change against single-task baselines in percent, signed so that higher is better.

    Maninis et al. ("Attentive Single-Tasking of Multiple Tasks", CVPR 2019) define, for one metric per task,

        Δm = 1/T Σ_t (-1)^(l_t) (M_t - B_t) / B_t,    l_t = 1 where lower is better, else 0.

    A task with several metrics counts once, as the mean over them. (CAGrad's and Nash-MTL's tables average
    over all metrics at once, which gives a task with five metrics five votes.) The change is relative to
    |B_t|, so that a negative baseline, such as a log-likelihood's, keeps the sign right.

    Args:
        results: `{task: {metric: value}}` of the multi-task model.
        baselines: the same of single-task models, with the same tasks and metrics.
        higher_is_better: `{task: {metric: bool}}`, or `{metric: bool}` for all tasks.

    Raises:
        UsageError: tasks or metrics differ, a direction is missing, or a baseline is zero.
    """
    _same_names("tasks", results, baselines)
    if not results:
        raise UsageError("delta_m needs the results of at least one task, but got none.")
    return fmean(
        _task_change(task, metrics, baselines[task], _task_directions(task, higher_is_better))
        for task, metrics in results.items()
    )


def _accumulators(task: Task, device: torch.device, across_ranks: bool) -> dict[str, MetricState]:
    states = {metric.name: metric.make().to(device) for metric in task.metrics}
    if not states:
        from torchmetrics.aggregation import MeanMetric

        # torchmetrics' default drops NaN from the mean; a loss that is NaN must stay visible.
        states = {LOSS: MeanMetric(nan_strategy="disable").to(device)}
    if not across_ranks:
        for part in (part for state in states.values() for part in state.modules()):
            cast("MetricState", part).distributed_available_fn = lambda: (
                False
            )  # torchmetrics asks each before it gathers
    return states


def _update(states: Mapping[str, MetricState], task: Task, output: Any, target: Any) -> bool:
    """Count a batch; False if the task is absent in it after all."""
    if task.metrics:
        for state in states.values():
            state.update(output, target)
        return True
    loss = task.loss(output, target)
    if loss is None:
        return False
    count = len(target) if isinstance(target, Tensor) and target.ndim > 0 else 1
    # Repeated, not weighted: MeanMetric ignores weights when told to leave NaN alone (torchmetrics 1.9).
    states[LOSS].update(loss.expand(count))
    return True


def _number(state: MetricState, task: str, metric: str) -> float:
    value = torch.as_tensor(state.compute())
    if value.numel() != 1:
        raise ProblemError(
            f"Metric {metric!r} of task {task!r} must be one number, but has shape {tuple(value.shape)}. "
            "Make it average, for example with average='macro'."
        )
    return value.item()


def _task_change(
    task: str, metrics: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> float:
    _same_names(f"metrics of task {task!r}", metrics, baseline)
    if not metrics:
        raise UsageError(f"Task {task!r} has no metrics to compare.")
    changes = []
    for name, value in metrics.items():
        if name not in higher_is_better:
            raise UsageError(
                f"higher_is_better does not say which way metric {name!r} of task {task!r} improves; "
                f"add {name!r}: True or False."
            )
        if baseline[name] == 0:
            raise UsageError(
                f"The baseline of metric {name!r} of task {task!r} is 0, so a relative change is undefined. "
                "Leave the metric out, or use one that cannot be 0."
            )
        sign = 1 if higher_is_better[name] else -1
        changes.append(100 * sign * (value - baseline[name]) / abs(baseline[name]))
    return fmean(changes)


def _task_directions(
    task: str, higher_is_better: Mapping[str, Mapping[str, bool]] | Mapping[str, bool]
) -> Mapping[str, bool]:
    flat = {name: value for name, value in higher_is_better.items() if not isinstance(value, Mapping)}
    own = higher_is_better.get(task)
    return own if isinstance(own, Mapping) else flat


def _same_names(what: str, results: Mapping[str, Any], baselines: Mapping[str, Any]) -> None:
    if set(results) != set(baselines):
        raise UsageError(
            f"Results and baselines must have the same {what}, but the results have {sorted(results)} "
            f"and the baselines {sorted(baselines)}."
        )
