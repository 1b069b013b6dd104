"""Losses multiplied by a number, for example by a GradScaler: methods see losses and gradients without it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from recon.errors import UsageError
from recon.methods.bases.method import Method
from recon.methods.gradients.held import held
from recon.methods.gradients.sparse import from_rows
from recon.support.network.hooks import hooked
from recon.support.network.tables import sparse_tables

logger = logging.getLogger(__name__)

LossScaleLike = float | Tensor | GradScaler
"""What all losses of a step were multiplied by: the number, or the scaler that did it."""

_looked_at: WeakSet[Method] = WeakSet()


def read_scale(loss_scale: LossScaleLike | None, losses: Mapping[str, Tensor]) -> Tensor | None:
    """The number as a 0-dimensional tensor on the losses' device; None without a scale."""
    if loss_scale is None:
        return None
    device = next((loss.device for loss in losses.values()), torch.device("cpu"))
    if isinstance(loss_scale, GradScaler):
        # What it multiplies with, and no copy to the CPU, which get_scale() would wait for.
        return loss_scale.scale(torch.ones((), device=device)) if loss_scale.is_enabled() else None
    tensor = isinstance(loss_scale, Tensor) and loss_scale.numel() == 1 and not loss_scale.is_complex()
    if not tensor and (isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float))):
        got = f"of shape {tuple(loss_scale.shape)}" if isinstance(loss_scale, Tensor) else repr(loss_scale)
        raise UsageError(
            f"loss_scale is {got}. Pass the number that every loss was multiplied by (1 / 4 for loss / 4), or the "
            "torch.amp.GradScaler that did it."
        )
    on_cpu = not isinstance(loss_scale, Tensor) or loss_scale.device.type == "cpu"
    if on_cpu and not 0 < float(loss_scale) < math.inf:  # elsewhere, asking would wait for it
        raise UsageError(f"loss_scale is {float(loss_scale)}. It must be above 0 and finite.")
    if isinstance(loss_scale, Tensor):
        return loss_scale.detach().reshape(()).to(device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(float(loss_scale), dtype=wide, device=device)


def without_scale(losses: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """The losses' own values; on the way back, the gradients stay as large as the scale makes them."""
    known = {task: held(loss) for task, loss in losses.items()}
    return {
        task: (loss.detach() / scale).to(loss.dtype) + (loss - loss.detach())
        if (found := known[task]) is None
        else found.as_loss((loss.detach() / scale).to(loss.dtype))
        for task, loss in losses.items()
    }


def unscaled(tensor: Tensor, scale: Tensor | None, power: int = 1) -> Tensor:
    """A norm of scaled gradients, or a product of `power` of them, as it is without the scale."""
    return tensor if scale is None else tensor / scale.to(tensor) ** power


def learns_at(scale: Tensor, method: Method) -> AbstractContextManager[Any]:
    """The gradients of the method's own parameters are as large as the model's: one optimizer divides them all."""
    return hooked(p.register_hook(lambda g: g * scale.to(g)) for p in method.parameters() if p.requires_grad)


def let_scaler_skip(model: nn.Module, method: Method) -> None:
    """Leave gradients with which the GradScaler skips the step, of whatever optimizer, and lowers its scale."""
    tables = set(sparse_tables(model))
    for parameter in [*model.parameters(), *method.parameters()]:
        if parameter.requires_grad:
            nan = parameter.new_full((1, *parameter.shape[1:]) if parameter in tables else parameter.shape, math.nan)
            first = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
            parameter.grad = from_rows(nan, first, parameter) if parameter in tables else nan


def warn_if_scaled(losses: Mapping[str, Tensor], method: Method) -> None:
    """Warn, once for each method, that all losses end in a multiplication by one number, if that matters to it."""
    if method.scale_free or method in _looked_at or len(losses) < 2:
        return
    _looked_at.add(method)
    factors = [_factor(loss) for loss in losses.values()]
    if None in factors or len(set(factors)) > 1:
        return
    logger.warning(
        "Every loss was multiplied or divided by the same number, but the weights of method %r depend on how large the "
        "losses are. If the number is the scale of a GradScaler, or counts batches that are accumulated, pass it: "
        "recon.backward(losses, model, method, loss_scale=scaler), or loss_scale=1 / batches. If it is a part of your "
        "losses, all is well.",
        method.name,
    )


def _factor(loss: Tensor) -> object:
    """Identifies the factor, if the loss ends in a product with a constant."""
    node = loss.grad_fn
    kind = "" if node is None else node.name()
    if kind not in ("MulBackward0", "DivBackward0"):
        return None
    try:
        saved = [getattr(node, name, None) for name in ("_saved_self", "_saved_other")]
    except RuntimeError:  # the graph was freed: backward will say so
        return None
    constants = [x for x in saved if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad]
    if len(constants) != 1 or len([x for x in saved if x is not None]) != 1:
        return None
    (constant,) = constants
    # A scaler's number is one tensor; reading it on a GPU would wait for it.
    return kind, constant.item() if constant.device.type == "cpu" else constant.data_ptr()
