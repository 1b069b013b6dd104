"""One step's update: from the tasks' losses to `.grad`, by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from recon.batches import model_device
from recon.distributed import average_, world_size
from recon.errors import GradientError, NonFiniteError, UsageError
from recon.gradients import (
    TaskJacobian,
    Workspace,
    add_gradient,
    task_jacobian,
    write_combination,
    write_own,
    write_update,
)
from recon.gramians import gramian
from recon.layer_norms import layer_norms
from recon.methods import (
    Aggregator,
    Composition,
    FeatureMethod,
    GramianAggregator,
    Joint,
    Method,
    NormWeighting,
    Weighting,
    wrap,
)
from recon.methods.zero_gradients import with_meaning
from recon.observer import StepObserver
from recon.reach import average_losses, compiled_as_one, find_reach, no_gradient
from recon.scaled_losses import LossScaleLike, learns_at, let_scaler_skip, read_scale, warn_if_scaled, without_scale
from recon.trainable import Model, as_module

_workspaces: WeakKeyDictionary[Method, Workspace] = WeakKeyDictionary()  # no part of a method that is copied or saved


def backward(
    losses: Mapping[str, Tensor],
    model: Model,
    method: Method | None = None,
    *,
    profiler: StepObserver | None = None,
    loss_scale: LossScaleLike | None = None,
) -> dict[str, Tensor]:
    """Accumulate the method's update into the parameters' `.grad`, in place of `sum(losses).backward()`.

    A parameter that one task alone reaches gets that task's gradient, weighted by a loss weighting, be it alone or
    before an aggregator, and as it is by an aggregator alone. A loss weighting that learns (uw) gets its own gradients
    too: give its parameters to the optimizer.

    Where several processes train together, the gradients are averaged over the ranks, as DistributedDataParallel
    does; the model may be wrapped in it or not.

    Args:
        losses: `{task name: scalar loss}` of this step; a task whose target is missing is left out.
        model: plain or branched, or a list of the modules that make it up, `[encoder, decoder]`. It may be compiled.
        method: from `recon.methods.get`, or one of TorchJD's (see `recon.methods.wrap`); joint training (the sum of the
            losses) when not given.
        profiler: records this step's conflicts from the same gradients.
        loss_scale: what every loss was multiplied by: a number (`1 / 4` for losses divided by 4), or the
            `torch.amp.GradScaler` that did it. Methods see the losses and gradients without it, and `.grad`, that of
            a method's own parameters included, is as large as it makes them. With a scaler, gradients that overflow are
            no error: they are left so that the scaler skips the step.

    Returns:
        `{task name: weight}`, what the loss or the gradient of each task was multiplied by; empty for a method
        that has no such weights. A task whose gradient an aggregator found to be zero has none.

    Raises:
        GradientError: a task's loss depends on no parameter.
        NonFiniteError: a gradient that the method needs is not finite.
        UnknownNameError: the model has no layer of the name that the method was given.
        UsageError: no losses, a model that is none or is sharded over processes, a method that is not a
            `recon.methods.Method`, or one that works from task gradients while the profiler keeps none.
    """
    method = _checked(method, losses, profiler)
    model = as_module(model)
    if not method.tasks:
        method.setup(tuple(losses))
    scale = read_scale(loss_scale, losses)
    if scale is None:
        warn_if_scaled(losses, method)
        return _backward(losses, model, method, profiler)
    try:
        with learns_at(scale, method):
            return _backward(without_scale(losses, scale), model, method, profiler, scale)
    except NonFiniteError:
        if not isinstance(loss_scale, GradScaler):
            raise
        let_scaler_skip(model, method)
        return {}


def _backward(
    losses: Mapping[str, Tensor],
    model: nn.Module,
    method: Method,
    profiler: StepObserver | None,
    loss_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """See `backward`; here, the scale is in the losses' gradients alone."""
    device = model_device(model)
    if isinstance(method, FeatureMethod):
        if compiled_as_one(losses):
            raise UsageError(
                f"Method {method.name!r} works between the shared layers and the heads, but they are compiled as one. "
                "Compile the shared body and the heads apart, or train the plain model."
            )
        with _full_precision(device):
            return method.backward(losses, model, **({} if loss_scale is None else {"loss_scale": loss_scale}))
    parameters = list(model.parameters()) if profiler is None else profiler.parameters
    recorder = profiler if profiler is not None and profiler.begin_step() else None
    weighting = method.weighting if isinstance(method, Composition) else method
    if isinstance(weighting, NormWeighting):
        with _full_precision(device):
            norms = layer_norms(losses, model, weighting.layer)
            weighting.observe_norms({task: _unscaled(norm, loss_scale) for task, norm in norms.items()})
    if isinstance(method, Weighting):
        if recorder is not None:
            with _full_precision(recorder.device):
                return _recorded_weighting(method, losses, recorder)
        # DistributedDataParallel would average, too, but wants one forward a step, and every parameter in it.
        if world_size() > 1:
            return _averaged_weighting(method, losses, parameters)
        total, weights = method.combine(losses)
        total.backward()
        return weights
    assert isinstance(method, Aggregator)
    with _full_precision(device):
        workspace = recorder.workspace if recorder else _workspaces.setdefault(method, Workspace())
        jacobian = task_jacobian(losses, parameters, workspace, model.buffers())
        if recorder is not None:
            recorder.observe(jacobian)
        aggregator = method.aggregator if isinstance(method, Composition) else method
        if aggregator.needs_losses:
            aggregator.observe_losses(average_losses(losses, jacobian.tasks, device))
        if isinstance(method, Composition):
            return _apply_composition(method, losses, jacobian, loss_scale)
        return _apply_aggregator(method, jacobian, loss_scale)


def _unscaled(tensor: Tensor, scale: Tensor | None, power: int = 1) -> Tensor:
    return tensor if scale is None else tensor / scale.to(tensor) ** power


def _full_precision(device: torch.device) -> torch.autocast:
    """Gradients and weights are no activations: autocast must not round what is made of them."""
    return torch.autocast(device.type, enabled=False)


def _checked(method: Method | None, losses: Mapping[str, Tensor], profiler: StepObserver | None) -> Method:
    method = Joint() if method is None else wrap(method)
    if not isinstance(losses, Mapping):
        raise UsageError(f"losses is a {type(losses).__name__}. Pass a dict: {{task name: scalar loss}}.")
    if not losses and world_size() == 1:
        raise UsageError("There is no loss: every task's target was missing. Skip such a batch.")
    odd = [task for task in losses if not isinstance(task, str)]
    if odd:
        raise UsageError(f"The losses are of the tasks {list(losses)}. Name tasks by strings, not by {odd[0]!r}.")
    for task, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise UsageError(
                f"The loss of task {task!r} must be a scalar tensor, but is {got}. Reduce it: mean(), say."
            )
        if not loss.requires_grad:
            raise GradientError(no_gradient(task))
    if profiler is not None and isinstance(method, FeatureMethod):
        raise UsageError(
            f"Method {method.name!r} changes the gradients inside the model, so there are none of the shared "
            "parameters to record. Profile with another method, joint say, and train with this one afterwards."
        )
    if profiler is not None and profiler.memory == "sketch" and not isinstance(method, Weighting):
        raise UsageError(
            f"memory='sketch' keeps no task gradients, but method {method.name!r} works from them. Profile with joint "
            "or another weighting of the losses, or with memory='exact'."
        )
    return method


def _adds_up(method: Weighting) -> bool:
    """Whether the update is the plain sum of the gradients: no need to multiply each by 1."""
    return isinstance(method, Joint) and method.static is None


def _recorded_weighting(method: Weighting, losses: Mapping[str, Tensor], profiler: StepObserver) -> dict[str, Tensor]:
    if profiler.memory == "sketch":
        return _sketched_weighting(method, losses, profiler)
    jacobian = task_jacobian(losses, profiler.parameters, profiler.workspace, profiler.buffers)
    profiler.observe(jacobian)
    weights = _weigh(method, losses, jacobian.tasks, profiler.device)
    if _adds_up(method) or not weights:
        write_combination(jacobian)
        write_own(jacobian)
    else:
        ordered = _in_order(weights, jacobian.tasks)
        write_combination(jacobian, ordered)
        write_own(jacobian, dict(zip(jacobian.tasks, ordered, strict=True)))
    return weights


def _in_order(weights: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    """(T,), zero for a task that a weighting left out of the step: its loss is."""
    nothing = torch.zeros_like(next(iter(weights.values())))
    return torch.stack([weights.get(task, nothing) for task in tasks])


def _sketched_weighting(method: Weighting, losses: Mapping[str, Tensor], profiler: StepObserver) -> dict[str, Tensor]:
    reach = find_reach(losses, profiler.parameters)
    weights = _weigh(method, losses, reach.tasks, profiler.device)
    plain = _adds_up(method) or not weights
    ordered = None if plain else dict(zip(reach.tasks, _in_order(weights, reach.tasks), strict=True))
    total = profiler.observe_sketched(losses, reach, ordered)
    for parameter, gradient in total.items():
        add_gradient(parameter, gradient)
    return weights


def _averaged_weighting(
    method: Weighting, losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """One backward pass on every rank, and its gradient averaged."""
    reach = find_reach(losses, parameters)
    weights = _weigh(method, losses, reach.tasks, parameters[0].device)
    anywhere = {p for reached in reach.parameters.values() for p in reached}
    reached = [p for p in parameters if p in anywhere]
    found: Sequence[Tensor | None] = [None] * len(reached)
    if losses:
        total = torch.stack([loss * weights.get(task, 0.0) for task, loss in losses.items()]).sum()
        found = torch.autograd.grad(total, reached, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(reached, found, strict=True)]
    average_(gradients)
    for parameter, gradient in zip(reached, gradients, strict=True):
        add_gradient(parameter, gradient)
    return weights


def _weigh(
    method: Weighting, losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The tasks' weights, alike on all ranks; a method that learns them gets its own gradients."""
    if not tasks:
        return {}
    # The model's graph may be spent; what is differentiated here is how the method's own parameters weigh the losses.
    total, weights = method.combine(average_losses(losses, tasks, device))
    if total.requires_grad:
        total.backward()
    return weights


def _apply_aggregator(method: Aggregator, jacobian: TaskJacobian, loss_scale: Tensor | None) -> dict[str, Tensor]:
    if not jacobian.tasks:
        return {}
    if isinstance(method, GramianAggregator):
        products = _unscaled(gramian(jacobian), loss_scale, power=2)
        vector = method.weights(products, tasks=jacobian.tasks)
        weights = with_meaning(dict(zip(jacobian.tasks, vector, strict=True)), products.diagonal().sqrt())
        write_combination(jacobian, vector)
    else:
        weights = _write_combined(method, jacobian, loss_scale)
    write_own(jacobian)
    return weights


def _apply_composition(
    method: Composition, losses: Mapping[str, Tensor], jacobian: TaskJacobian, loss_scale: Tensor | None
) -> dict[str, Tensor]:
    """The aggregator's update of the weighted task gradients; what one task alone reaches gets the task's weight."""
    scales = _weigh(method.weighting, losses, jacobian.tasks, jacobian.matrix.device)
    if not scales:
        return {}
    scale = _in_order(scales, jacobian.tasks)
    if isinstance(method.aggregator, GramianAggregator):
        products = _unscaled(gramian(jacobian), loss_scale, power=2)
        vector = method.gramian_weights(products, scale, jacobian.tasks)
        weights = with_meaning(dict(zip(jacobian.tasks, vector, strict=True)), products.diagonal().sqrt())
        write_combination(jacobian, vector)
    else:
        jacobian.matrix.mul_(scale.to(jacobian.matrix)[:, None])  # what was recorded of them is recorded
        further = _write_combined(method.aggregator, jacobian, loss_scale)
        weights = {task: scales[task] * weight for task, weight in further.items() if task in scales}
    write_own(jacobian, dict(zip(jacobian.tasks, scale, strict=True)))
    return {task: weight for task, weight in weights.items() if task in scales}


def _write_combined(method: Aggregator, jacobian: TaskJacobian, loss_scale: Tensor | None) -> dict[str, Tensor]:
    """Of a method that needs the gradients themselves."""
    if loss_scale is None:
        update, weights = method.combine(jacobian.matrix, jacobian.tasks)
    else:
        factor = loss_scale.to(jacobian.matrix)
        update, weights = method.combine(jacobian.matrix.div_(factor), jacobian.tasks)
        update = update * factor
    lengths = torch.linalg.vector_norm(jacobian.matrix, dim=1) if weights else update
    write_update(jacobian, update)
    return with_meaning(weights, lengths) if weights else weights
