"""StepObserver: what a training step calls on a profiler that records its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from recon.methods.gradients.jacobian import TaskJacobian, Workspace
from recon.methods.gradients.reach import Reach

Memory = Literal["exact", "sketch"]
"""What is kept of a step's task gradients: themselves, or a few numbers for each."""


class StepObserver(Protocol):
    """Sees the task gradients of a training's steps; `recon.Profiler` is one."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those whose gradients it records, in the order of a Jacobian's columns."""

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The model's."""

    @property
    def workspace(self) -> Workspace:
        """Where the Jacobians are made."""

    @property
    def memory(self) -> Memory:
        """Whether it needs whole gradients (`observe`) or takes them as they are made (`observe_sketched`)."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def begin_step(self) -> bool:
        """Whether it records the step that begins."""

    def observe(self, jacobian: TaskJacobian) -> None:
        """Record one step's task gradients, with respect to `parameters`."""

    def observe_sketched(
        self, losses: Mapping[str, Tensor], reach: Reach, weights: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Tensor]:
        """Differentiate the losses, record them, and return the weighted sum of their gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What was recorded."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on recording from there."""
