"""The update of a loss weighting, where one backward pass of one process is not enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recon.methods.bases.weighting import Weighting
from recon.methods.gradients.held import held
from recon.methods.gradients.jacobian import add_gradient, task_jacobian, write_combination, write_own
from recon.methods.gradients.observer import StepObserver
from recon.methods.gradients.reach import LossReach, average_losses, find_reach
from recon.methods.gradients.sparse import add, average_gradients
from recon.methods.weightings.joint import Joint


def adds_up(method: Weighting) -> bool:
    """Whether the update is the plain sum of the gradients: no need to multiply each by 1."""
    return isinstance(method, Joint) and method.static is None


def recorded_weighting(method: Weighting, losses: Mapping[str, Tensor], profiler: StepObserver) -> dict[str, Tensor]:
    """The weighted sum of the task gradients that the profiler records."""
    if profiler.memory == "sketch":
        return _sketched_weighting(method, losses, profiler)
    jacobian = task_jacobian(losses, profiler.parameters, profiler.workspace, profiler.buffers)
    profiler.observe(jacobian)
    weights = weigh(method, losses, jacobian.tasks, profiler.device)
    if adds_up(method) or not weights:
        write_combination(jacobian)
        write_own(jacobian)
    else:
        ordered = in_order(weights, jacobian.tasks)
        write_combination(jacobian, ordered)
        write_own(jacobian, dict(zip(jacobian.tasks, ordered, strict=True)))
    return weights


def in_order(weights: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    """(T,), zero for a task that a weighting left out of the step because its loss is 0."""
    nothing = torch.zeros_like(next(iter(weights.values())))
    return torch.stack([weights.get(task, nothing) for task in tasks])


def _sketched_weighting(method: Weighting, losses: Mapping[str, Tensor], profiler: StepObserver) -> dict[str, Tensor]:
    reach = find_reach(losses, profiler.parameters)
    weights = weigh(method, losses, reach.tasks, profiler.device)
    plain = adds_up(method) or not weights
    ordered = None if plain else dict(zip(reach.tasks, in_order(weights, reach.tasks), strict=True))
    total = profiler.observe_sketched(losses, reach, ordered)
    for parameter, gradient in total.items():
        add_gradient(parameter, gradient)
    return weights


def averaged_weighting(
    method: Weighting, losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """One backward pass on every rank, and its gradient averaged; none for gradients that are held already."""
    reach = find_reach(losses, parameters)
    weights = weigh(method, losses, reach.tasks, parameters[0].device)
    anywhere = {p for reached in reach.parameters.values() for p in reached}
    reached = [p for p in parameters if p in anywhere]
    found: Sequence[Tensor | None] = [None] * len(reached)
    if any_held(losses):
        found = [_weighted_sum(losses, weights, p) for p in reached]
    elif losses:
        total = torch.stack([loss * weights.get(task, 0.0) for task, loss in losses.items()]).sum()
        found = torch.autograd.grad(total, reached, allow_unused=True)
    own = {p: reach.nothing(p) if g is None else g.clone() for p, g in zip(reached, found, strict=True)}
    for parameter, gradient in average_gradients(own).items():
        add_gradient(parameter, gradient)
    return weights


def held_weighting(method: Weighting, losses: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The weighted sum of gradients that are held already, what is outside of the model included."""
    weights = weigh(method, losses, tuple(losses), device)
    leaves = dict.fromkeys(leaf for loss in losses.values() for leaf in LossReach.of(loss).leaves)
    for leaf in leaves:
        gradient = _weighted_sum(losses, weights, leaf)
        if gradient is not None:
            add_gradient(leaf, gradient)
    return weights


def any_held(losses: Mapping[str, Tensor]) -> bool:
    """Whether these are held losses: a step has only such or none."""
    return any(held(loss) is not None for loss in losses.values())


def _weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, Tensor], leaf: Tensor) -> Tensor | None:
    """The weighted sum of the held gradients at a leaf, which are held no longer; plain where there are no weights."""
    total = None
    for task, loss in losses.items():
        known = held(loss)
        gradient = None if known is None else known.take(leaf)
        if gradient is not None and (task in weights or not weights):
            part = gradient.mul_(weights[task].to(gradient)) if weights else gradient
            total = part if total is None else add(total, part)
    return total


def weigh(
    method: Weighting, losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The tasks' weights, alike on all ranks; a method that learns them gets its own gradients."""
    if not tasks:
        return {}
    # The model's graph may be freed already; this only differentiates with respect to the method's own parameters.
    total, weights = method.combine(average_losses(losses, tasks, device))
    if total.requires_grad:
        total.backward()
    return weights
