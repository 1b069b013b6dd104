"""LossScale: keeps the gradients of a float16 forward from vanishing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import GradientError
from recon.methods import Method
from recon.methods.gradients.observer import StepObserver
from recon.methods.updates.step import backward
from recon.methods.window import Window
from recon.support.network.hooks import hooked
from recon.support.processes import gather

_FIRST = 2.0**16
_GOOD_STEPS = 2000  # steps before a larger scale is tried


class LossScale:
    """What all losses of a step are multiplied by for the way back through the model, and divided by at its parameters.

    Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2), with the numbers of
    `torch.amp.GradScaler`. GradScaler divides `.grad`, after the method has made it; but many methods read more
    from a task's gradient than its direction, so here each is divided as it arrives. The losses keep their values.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = _FIRST
        self._good = 0
        self._overflow = torch.zeros((), dtype=torch.bool, device=device)
        self._method_before: dict[str, Any] | None = None

    def backward(
        self, losses: Mapping[str, Tensor], model: nn.Module, method: Method, profiler: StepObserver | None = None
    ) -> dict[str, Tensor]:
        """See `recon.backward`; no weights where a gradient was not finite."""
        with self._divided(model, method):
            return backward(self.multiplied(losses), model, method, profiler=profiler)
        return {}

    @contextmanager
    def joint_step(self, window: Window) -> Iterator[None]:
        """Around one step of a window, to which `multiplied` losses are added; see `backward`."""
        with self._divided(window.model, window.method):
            try:
                yield
            finally:
                window.discard()

    @contextmanager
    def _divided(self, model: nn.Module, method: Method) -> Iterator[None]:
        """Inside, gradients are divided as they arrive at the parameters, and those that overflow are no error."""
        if self._method_before is None:
            self._method_before = copy.deepcopy(method.state_dict())
        try:
            divide = self._divide(1 / self.value)
            with hooked(p.register_hook(divide) for p in model.parameters() if p.requires_grad):
                yield
        except GradientError:
            if not self._overflow:
                raise

    def finish_step(self, method: Method) -> bool:
        """Whether every gradient since the last call is finite on all ranks; sets the scale for the next step.

        If one is not, the method gets back the state of before. GradientError: no scale is small enough.
        """
        overflow = any(gather(bool(self._overflow)))
        before, self._method_before = self._method_before, None
        self._overflow.zero_()
        if not overflow:
            self._good += 1
            if self._good == _GOOD_STEPS:
                self.value, self._good = 2 * self.value, 0
            return True
        if before is not None:
            method.load_state_dict(before)
        self.value, self._good = self.value / 2, 0
        if self.value < 1:
            raise GradientError(
                "The gradients overflow in float16 at every scale of the losses. Look for the task whose loss grows, "
                "lower the learning rate, or compute in bfloat16 (amp='bf16')."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.value, self._good = state["value"], state["good"]

    def multiplied(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values, with gradients `value` times as large."""
        return {task: loss.detach() + self.value * (loss - loss.detach()) for task, loss in losses.items()}

    def _divide(self, factor: float) -> Callable[[Tensor | None], Tensor | None]:
        def hook(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            gradient = gradient * factor
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            self._overflow.logical_or_(~values.isfinite().all())
            return gradient

        return hook
