"""StepObserver: how a step hands its gradients to an observer that records them, such as a profiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from recon.methods.gradients.jacobian import TaskJacobian, Workspace
from recon.methods.gradients.reach import Reach

Memory = Literal["exact", "sketch"]
"""What is kept of a step's task gradients: themselves, or a few numbers for each."""


class SketchesByTask(Protocol):
    """Reads the gradients of a step task by task."""

    def fold(self, task: str, leaf: Tensor, gradient: Tensor) -> None:
        """Add a task's gradient at one leaf."""

    def of(self, tasks: Sequence[str]) -> Tensor:
        """The sketches of these tasks, zero for one without gradients."""


class StepObserver(Protocol):
    """Sees the task gradients of a training's steps; `recon.Profiler` is one."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters whose gradients it records, in the order of a Jacobian's columns."""

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The model's."""

    @property
    def workspace(self) -> Workspace:
        """Where the Jacobians are made."""

    @property
    def memory(self) -> Memory:
        """Whether it needs whole gradients (`observe`) or reads them as they are computed (`observe_sketched`)."""

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

    def records_next(self) -> bool:
        """Whether the step to come is one to record."""

    def sketches_by_task(self) -> SketchesByTask:
        """For the gradients of the step to come, where it goes task by task and needs no whole gradients."""

    def observe_by_task(self, sketches: Tensor, reach: Reach, others: Sequence[Tensor]) -> None:
        """Record a step that went task by task, which has begun; `others` are gradients that no sketch has."""

    def wants_floor(self) -> bool:
        """Whether the step to come is one for a noise floor."""

    def floor_of_next_step(self, losses: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]]) -> None:
        """Compare the gradients of these losses, of another batch, with those of the step to come.

        Of several forwards, each is differentiated before the next is asked for; losses of the same task add up.
        """

    def state_dict(self) -> dict[str, Any]:
        """What was recorded."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on recording from there."""
