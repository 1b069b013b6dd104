"""One step's update: from the tasks' losses to `.grad`, by any method."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from recon.errors import GradientError, NonFiniteError, UsageError
from recon.methods.bases.aggregator import Aggregator
from recon.methods.bases.feature_method import FeatureMethod
from recon.methods.bases.method import Method
from recon.methods.bases.weighting import Weighting
from recon.methods.by_name import method_by_name
from recon.methods.composition import Composition
from recon.methods.gradients.jacobian import Workspace, task_jacobian
from recon.methods.gradients.norms import layer_norms
from recon.methods.gradients.observer import StepObserver
from recon.methods.gradients.reach import average_losses, compiled_as_one, no_gradient
from recon.methods.torchjd_adapter import wrap
from recon.methods.updates import scaled_losses
from recon.methods.updates.aggregated import apply_aggregator, apply_composition
from recon.methods.updates.one_task_steps import warn_of_one_task_steps
from recon.methods.updates.scaled_losses import LossScaleLike
from recon.methods.updates.weighted import any_held, averaged_weighting, held_weighting, recorded_weighting
from recon.methods.weightings.gradnorm import NormWeighting
from recon.methods.weightings.joint import Joint
from recon.support.network.forward import model_device
from recon.support.network.trainable import Model, as_module
from recon.support.processes import gather, world_size

_workspaces: WeakKeyDictionary[Method, Workspace] = WeakKeyDictionary()  # no part of a method that is copied or saved


def backward(
    losses: Mapping[str, Tensor | None],
    model: Model,
    method: str | Method | None = None,
    *,
    profiler: StepObserver | None = None,
    loss_scale: LossScaleLike | None = None,
) -> dict[str, Tensor]:
    """Accumulate the method's update into the parameters' `.grad`, in place of `sum(losses).backward()`.

    A parameter that only one task reaches gets that task's gradient. A loss weighting, alone or before an aggregator,
    multiplies it by the task's weight; an aggregator alone leaves it as it is. A loss weighting that learns (uw) gets
    its own gradients too: give its parameters to the optimizer.

    Where several processes train together, the gradients are averaged over the ranks, as DistributedDataParallel
    does; the model may be wrapped in it or not.

    Args:
        losses: `{task name: scalar loss}` of this step; a task whose target is missing is left out, or None.
        model: plain or branched, or a list of the modules that make it up, `[encoder, decoder]`. It may be compiled.
        method: from `recon.methods.get`, or one of TorchJD's (see `recon.methods.wrap`); joint training (the sum of the
            losses) when not given. A name (`"cagrad"`, `"cagrad:c=0.5"`) is enough for a method that keeps nothing from
            step to step (`Method.memoryless`): recon makes it once for each model.
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
        UnknownNameError: there is no such method, or the model has no layer of the name that the method was given.
        UsageError: no losses, a model that is none or is sharded over processes, a method that is not a
            `recon.methods.Method`, the name of one that may keep something from step to step, or a method that works
            from task gradients while the profiler keeps none.
    """
    losses = present(losses)
    check_losses(losses)
    parts, model = model, as_module(model)
    if isinstance(method, str):
        # Of several modules, the one around them is another in every step.
        method = method_by_name(method, parts if isinstance(parts, nn.Module) else parts[0], _all_tasks(losses))
    return update(losses, model, Joint() if method is None else wrap(method), profiler, loss_scale)


def present(losses: Mapping[str, Tensor | None]) -> Mapping[str, Tensor]:
    """The losses without those that are None: their tasks are absent in this step."""
    if not isinstance(losses, Mapping):
        raise UsageError(f"losses is a {type(losses).__name__}. Pass a dict: {{task name: scalar loss}}.")
    return {task: loss for task, loss in losses.items() if loss is not None}


def update(
    losses: Mapping[str, Tensor],
    model: nn.Module,
    method: Method,
    profiler: StepObserver | None,
    loss_scale: LossScaleLike | None,
) -> dict[str, Tensor]:
    """See `backward`, of losses that have their graphs or of held ones."""
    check_profiler(profiler, method)
    warn_of_one_task_steps(method, tuple(losses))
    if not method.tasks:
        method.setup(_all_tasks(losses))
    scale = scaled_losses.read_scale(loss_scale, losses)
    if scale is None:
        scaled_losses.warn_if_scaled(losses, method)
        return _backward(losses, model, method, profiler)
    try:
        with scaled_losses.learns_at(scale, method):
            return _backward(scaled_losses.without_scale(losses, scale), model, method, profiler, scale)
    except NonFiniteError:
        if not isinstance(loss_scale, GradScaler):
            raise
        scaled_losses.let_scaler_skip(model, method)
        return {}


def workspace_of_next(method: Method, profiler: StepObserver | None) -> Workspace | None:
    """Where the task gradients of the step to come will lie; None if it makes no Jacobian of them."""
    if profiler is not None and profiler.memory == "exact" and profiler.records_next():
        return profiler.workspace
    return _workspace_of(method) if isinstance(method, Aggregator) else None


def _workspace_of(method: Aggregator) -> Workspace:
    return _workspaces.setdefault(method, Workspace())


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
                "Compile the shared body and the heads separately, or train the plain model."
            )
        with _full_precision(device):
            return method.backward(losses, model, **({} if loss_scale is None else {"loss_scale": loss_scale}))
    parameters = list(model.parameters()) if profiler is None else profiler.parameters
    recorder = profiler if profiler is not None and profiler.begin_step() else None
    weighting = method.weighting if isinstance(method, Composition) else method
    if isinstance(weighting, NormWeighting):
        with _full_precision(device):
            norms = layer_norms(losses, model, weighting.layer)
            weighting.observe_norms({task: scaled_losses.unscaled(norm, loss_scale) for task, norm in norms.items()})
    if isinstance(method, Weighting):
        if recorder is not None:
            with _full_precision(recorder.device):
                return recorded_weighting(method, losses, recorder)
        if any_held(losses) and world_size() == 1:
            with _full_precision(device):
                return held_weighting(method, losses, device)
        # DistributedDataParallel would average, too, but it needs a single forward a step, which uses every parameter.
        if world_size() > 1:
            return averaged_weighting(method, losses, parameters)
        total, weights = method.combine(losses)
        total.backward()
        return weights
    assert isinstance(method, Aggregator)
    with _full_precision(device):
        workspace = recorder.workspace if recorder else _workspace_of(method)
        jacobian = task_jacobian(losses, parameters, workspace, model.buffers())
        if recorder is not None:
            recorder.observe(jacobian)
        aggregator = method.aggregator if isinstance(method, Composition) else method
        if aggregator.needs_losses:
            aggregator.observe_losses(average_losses(losses, jacobian.tasks, device))
        if isinstance(method, Composition):
            return apply_composition(method, losses, jacobian, loss_scale)
        return apply_aggregator(method, jacobian, loss_scale)


def _full_precision(device: torch.device) -> torch.autocast:
    """Switch autocast off: it is for activations, and must not round what is computed from gradients and weights."""
    return torch.autocast(device.type, enabled=False)


def _all_tasks(losses: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tasks that have a loss on any rank; every rank gets the same answer, though its own part may lack some."""
    return tuple(dict.fromkeys(task for tasks in gather(tuple(losses)) for task in tasks))


def check_losses(losses: Mapping[str, Tensor]) -> None:
    """Refuse losses that are no scalars with a gradient, or have no names."""
    if not losses and world_size() == 1:
        raise UsageError("losses is empty: every task's target was missing. Skip such a batch.")
    odd = [task for task in losses if not isinstance(task, str)]
    if odd:
        raise UsageError(f"The losses are of the tasks {list(losses)}. Name tasks by strings, not by {odd[0]!r}.")
    for task, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise UsageError(
                f"The loss of task {task!r} must be a scalar tensor, but is {got}. Reduce it, for example with mean()."
            )
        if not loss.requires_grad:
            raise GradientError(no_gradient(task))


def check_profiler(profiler: StepObserver | None, method: Method) -> None:
    """Refuse a method whose task gradients the profiler cannot see, or does not keep."""
    if profiler is None:
        return
    if isinstance(method, FeatureMethod):
        raise UsageError(
            f"Method {method.name!r} changes the gradients inside the model, so there are none of the shared "
            "parameters to record. Profile with another method, such as joint, and train with this one afterwards."
        )
    if profiler.memory == "sketch" and not isinstance(method, Weighting):
        raise UsageError(
            f"memory='sketch' keeps no task gradients, but method {method.name!r} works from them. Profile with joint "
            "or another weighting of the losses, or with memory='exact'."
        )
