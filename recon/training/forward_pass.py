"""The losses of a batch, part by part, and the tasks at fault for a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from recon.methods import Method
from recon.methods.gradients.observer import StepObserver
from recon.methods.gradients.sparse import entries
from recon.problems.losses import TaskLosses
from recon.support.network.forward import Part
from recon.support.processes import world_size
from recon.training.precision import Precision

PLAIN = Precision(None, torch.device("cpu"))
"""The forward in the model's own precision."""


def part_losses(
    model: nn.Module, part: Part, losses: TaskLosses, precision: Precision | None = None
) -> dict[str, Tensor]:
    """`{task name: scalar loss}` of one part of a batch, for the tasks that are present in it.

    The precision is that of the forward: the model's own when not given.
    """
    needed = losses.needed(part)
    if needed is not None and not needed:
        return {}
    return losses.of((precision or PLAIN).outputs(model, part.inputs, needed), part)


def joint_losses(
    model: nn.Module, parts: Sequence[Part], losses: TaskLosses, precision: Precision | None = None
) -> Iterator[dict[str, Tensor]]:
    """The losses of each part of a joint step, as they are computed; they add up to the losses of the step.

    A task that has a target in several parts counts with the mean over these.
    """
    counts = part_counts(parts, losses)
    for part in parts:
        found = part_losses(model, part, losses, precision)
        yield {task: loss / n if (n := counts.get(task, 1)) > 1 else loss for task, loss in found.items()}


def make_update(
    model: nn.Module,
    parts: Sequence[Part],
    losses: TaskLosses,
    method: Method,
    profiler: StepObserver | None = None,
    precision: Precision = PLAIN,
    check: Callable[[Mapping[str, Tensor]], None] = lambda losses: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Accumulate the method's update of a batch, or of a joint step, into `.grad`.

    Of several parts, each runs its own forward and backward, and its graph is freed before the next.

    Args:
        model: the model.
        parts: on its device.
        losses: of the tasks.
        method: set up for these.
        profiler: records the step.
        precision: of the forward.
        check: is shown the losses of each part before they are differentiated.

    Returns:
        `{task: loss}`, detached, empty if no task is present; and `{task: weight}`, as `recon.backward` gives it.
    """

    def checked() -> Iterator[dict[str, Tensor]]:
        for found in joint_losses(model, parts, losses, precision):
            check(found)
            yield found

    if len(parts) > 1:
        total, weights = precision.joint_backward(checked(), model, method, profiler)
        return {task: total[task] for task in losses.tasks if task in total}, weights
    found = next(checked(), {})
    if not found and world_size() == 1:  # other ranks may have some
        return {}, {}
    weights = precision.backward(found, model, method, profiler)
    return {task: loss.detach() for task, loss in found.items()}, weights


def part_counts(parts: Sequence[Part], losses: TaskLosses) -> dict[str, int]:
    """In how many parts each task has a target."""
    counts: dict[str, int] = {}
    for part in parts:
        for task in losses.present(part):
            counts[task] = counts.get(task, 0) + 1
    return counts


def added_up(tables: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of each task over the tables that have it."""
    total: dict[str, Tensor] = {}
    for table in tables:
        for task, value in table.items():
            total[task] = total[task] + value if task in total else value
    return total


def non_finite_tasks(losses: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """The tasks whose gradient is not finite somewhere; the losses' graph is freed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    bad = set()
    for number, (task, loss) in enumerate(losses.items(), start=1):
        found = torch.autograd.grad(loss, parameters, retain_graph=number < len(losses), allow_unused=True)
        if any(not entries(g).isfinite().all() for g in found if g is not None):
            bad.add(task)
    return bad
