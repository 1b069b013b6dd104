"""A step's backward passes that fold every gradient into a sketch as it comes, and keep none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from recon.methods.gradients.observer import StepObserver
from recon.methods.gradients.passes import differentiate
from recon.methods.gradients.reach import Reach
from recon.methods.gradients.sparse import add
from recon.profiling.sketches.sketch import GradientSketch


def sketched_step(
    losses: Mapping[str, Tensor],
    reach: Reach,
    weights: Mapping[str, Tensor] | None,
    sketch: GradientSketch,
    observer: StepObserver,
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """The sketches (T, L, m) of the T tasks' gradients, and the sum of these gradients: means over the ranks.

    Args:
        losses: `{task: scalar loss}`; their graph is freed.
        reach: of the losses.
        weights: of the tasks in the sum; 1 if not given.
        sketch: of L layers.
        observer: whose parameters are differentiated for.
    """
    sketches = sketch.zeros(len(reach.tasks), observer.device)
    total: dict[Tensor, Tensor] = {}

    def receive(number: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf in sketch:
                sketch.fold(leaf, gradient, sketches[number])
            part = gradient if weights is None else gradient * weights[reach.tasks[number]].to(gradient)
            total[leaf] = add(total[leaf], part) if leaf in total else part.clone()

    differentiate(losses, reach, observer.buffers, receive)
    reach.average(total, observer.parameters, beside=[sketches])
    return sketches, total
