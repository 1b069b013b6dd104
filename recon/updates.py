"""One step's update: from the tasks' losses to `.grad`, by any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.errors import UsageError
from recon.gradients import TaskJacobian, gramian, task_jacobian, write_combination, write_own, write_update
from recon.methods import Aggregator, GramianAggregator, Joint, Method, Weighting

if TYPE_CHECKING:
    from recon.profiler import Profiler


def backward(
    losses: Mapping[str, Tensor], model: nn.Module, method: Method | None = None, *, profiler: Profiler | None = None
) -> dict[str, Tensor]:
    """Accumulate the method's update into the parameters' `.grad`, in place of `sum(losses).backward()`.

    A parameter that one task alone reaches gets that task's gradient, weighted by a loss weighting and as it is
    by a gradient aggregator. A loss weighting that learns (uw) gets its own gradients too: give its parameters
    to the optimizer.

    Args:
        losses: `{task name: scalar loss}` of this step; a task whose target is missing is left out.
        model: plain or branched.
        method: from `recon.methods.get`; joint training (the sum of the losses) when not given.
        profiler: records this step's conflicts from the same gradients.

    Returns:
        `{task name: weight}`, what the loss or the gradient of each task was multiplied by; empty for a method
        that has no such weights.

    Raises:
        GradientError: a task's loss depends on no parameter, or a gradient that the method needs is not finite.
        UsageError: no losses, or a method that is not a `recon.methods.Method`.
    """
    method = Joint() if method is None else method
    if not isinstance(method, Method):
        raise UsageError(
            f"method is a {type(method).__name__}, not a method. Make it once, before the loop: "
            "method = recon.methods.get('pcgrad')."
        )
    if not method.tasks:
        method.setup(tuple(losses))
    if isinstance(method, Weighting) and profiler is None:
        total, weights = method.combine(losses)
        total.backward()
        return weights
    jacobian = task_jacobian(losses, model.parameters() if profiler is None else profiler.parameters)
    if profiler is not None:
        profiler.observe(jacobian)
    if isinstance(method, Weighting):
        return _apply_weighting(method, losses, jacobian)
    assert isinstance(method, Aggregator)
    return _apply_aggregator(method, jacobian)


def _apply_weighting(method: Weighting, losses: Mapping[str, Tensor], jacobian: TaskJacobian) -> dict[str, Tensor]:
    # The model's graph is spent; what is left to differentiate is how the method's own parameters weigh the losses.
    total, weights = method.combine({task: loss.detach() for task, loss in losses.items()})
    if total.requires_grad:
        total.backward()
    if isinstance(method, Joint):
        write_combination(jacobian)
        write_own(jacobian)
    else:
        write_combination(jacobian, torch.stack([weights[task] for task in jacobian.tasks]))
        write_own(jacobian, weights)
    return weights


def _apply_aggregator(method: Aggregator, jacobian: TaskJacobian) -> dict[str, Tensor]:
    weights = {}
    if isinstance(method, GramianAggregator):
        vector = method.weights(gramian(jacobian), tasks=jacobian.tasks)
        weights = dict(zip(jacobian.tasks, vector, strict=True))
        write_combination(jacobian, vector)
    else:
        write_update(jacobian, method(jacobian.matrix()))
    write_own(jacobian)
    return weights
