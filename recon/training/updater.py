"""Updater: from the parts of a batch, or of a joint step, to `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from recon.methods import Method
from recon.methods.gradients.observer import StepObserver
from recon.methods.window import Window
from recon.problems.losses import TaskLosses
from recon.support.network.forward import Part
from recon.support.processes import world_size
from recon.training.batches.forward_pass import PLAIN, added_up, joint_losses
from recon.training.precision import Precision

Scalars = dict[str, Tensor]


class Updater:
    """Accumulates a method's updates into `.grad`, of one batch, or of one joint step, after the other.

    Of several parts, each runs its own forward and backward, and its graph is freed before the next.

    Args:
        model: the model.
        losses: of the tasks.
        method: set up for these.
        profiler: records the steps.
        precision: of the forward.
        check: is shown the losses of each part before they are differentiated.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: TaskLosses,
        method: Method,
        profiler: StepObserver | None = None,
        precision: Precision = PLAIN,
        check: Callable[[Mapping[str, Tensor]], None] = lambda losses: None,
    ) -> None:
        self.model = model
        self.losses = losses
        self.method = method
        self.profiler = profiler
        self.precision = precision
        self.check = check
        self._window: Window | None = None  # made when it is needed: not all methods go task by task

    def __call__(self, parts: Sequence[Part]) -> tuple[Scalars, Scalars]:
        """Make the update of these parts, which are on the model's device.

        Returns:
            `{task: loss}`, detached, empty if no task is present; and `{task: weight}`, as `recon.backward` gives it.
        """
        parts = [part for part in parts if (needed := self.losses.needed(part)) is None or needed]
        passes = self._passes(parts)
        if len(parts) > 1:
            return self._joint(passes)
        losses = next(passes, {})
        if not losses and world_size() == 1:  # other ranks may have some
            return {}, {}
        weights = self.precision.backward(losses, self.model, self.method, self.profiler)
        return {task: loss.detach() for task, loss in losses.items()}, weights

    def _joint(self, passes: Iterable[Scalars]) -> tuple[Scalars, Scalars]:
        if self._window is None:
            self._window = Window(self.model, self.method, profiler=self.profiler)
        total: Scalars = {}
        weights: Scalars = {}
        with self.precision.joint_step(self._window, passes) as scaled:
            for losses in scaled:
                self._add(self._window, losses)
                total = added_up([total, {task: loss.detach() for task, loss in losses.items()}])
                del losses  # with it goes the graph, before the next part runs
            if total or world_size() > 1:
                weights = self._window.step()
        return {task: total[task] for task in self.losses.tasks if task in total}, weights

    @staticmethod
    def _add(window: Window, losses: Scalars) -> None:
        for number, (task, loss) in enumerate(losses.items(), start=1):
            window.add(task, loss, retain_graph=number < len(losses))

    def _passes(self, parts: Sequence[Part]) -> Iterator[Scalars]:
        for losses in joint_losses(self.model, parts, self.losses, self.precision):
            self.check(losses)
            yield losses
            del losses
