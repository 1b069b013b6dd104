"""Precision: in which number format the forward runs, and whether a step's gradients are finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from recon.errors import UsageError
from recon.methods import Method
from recon.methods.gradients.observer import StepObserver
from recon.methods.updates.step import backward
from recon.methods.window import Window
from recon.support.network.forward import task_outputs
from recon.support.network.trees import map_tree
from recon.training.loss_scale import LossScale

Amp = Literal["bf16", "fp16"]
"""What autocast computes the forward in."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How the steps of a training are computed: in the model's own precision, or by autocast.

    Autocast surrounds the forward alone: its outputs become float32 before the losses see them, and gradients, updates
    and weights are those of the parameters' own precision.
    """

    def __init__(self, amp: Amp | None, device: torch.device) -> None:
        if amp is not None and amp not in get_args(Amp):
            raise UsageError(f"amp is {amp!r}. Choose 'bf16', 'fp16' or None.")
        if amp == "fp16" and device.type == "cpu":
            raise UsageError(
                "amp='fp16' needs a GPU: on a CPU, float16 is slower than float32. Use amp='bf16', or leave it out."
            )
        self.device = device
        self.dtype = None if amp is None else _DTYPES[amp]
        self.scale = LossScale(device) if amp == "fp16" else None

    def outputs(self, model: nn.Module, inputs: Any, tasks: Sequence[str] | None) -> Mapping[str, Any]:
        """The model's outputs, with those of `tasks`, if they are named; see `task_outputs`."""
        if self.dtype is None:
            return task_outputs(model, inputs, tasks or ())
        with torch.autocast(self.device.type, self.dtype):
            outputs = task_outputs(model, inputs, tasks or ())
        names = outputs if tasks is None else tasks
        return {name: map_tree(_at_least_float32, outputs[name]) for name in names}

    def backward(
        self, losses: Mapping[str, Tensor], model: nn.Module, method: Method, profiler: StepObserver | None
    ) -> dict[str, Tensor]:
        """See `recon.backward`; a gradient that overflows in float16 is no error, see `gradients_finite`."""
        if self.scale is None:
            return backward(losses, model, method, profiler=profiler)
        return self.scale.backward(losses, model, method, profiler)

    @contextmanager
    def joint_step(self, window: Window, losses: Iterable[dict[str, Tensor]]) -> Iterator[Iterable[dict[str, Tensor]]]:
        """Around one step of a window: the losses as they are to be added to it."""
        if self.scale is None:
            yield losses
        else:
            with self.scale.joint_step(window):
                yield map(self.scale.multiplied, losses)

    def scaled(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses times what keeps their gradients from vanishing, for gradients of which only cosines are read."""
        return {task: loss if self.scale is None else loss * self.scale.value for task, loss in losses.items()}

    def gradients_finite(self, method: Method) -> bool:
        """Whether all gradients since the last call are finite; if not, the method forgets them."""
        return self.scale is None or self.scale.finish_step(method)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {} if self.scale is None else self.scale.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.scale is not None:
            self.scale.load_state_dict(state)


def _at_least_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in _DTYPES.values()
    return value.float() if half else value
