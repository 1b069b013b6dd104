"""The losses of a batch, part by part, and the tasks at fault for a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from recon.methods.gradients.sparse import entries
from recon.problems.losses import TaskLosses
from recon.support.network.forward import Part
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
        yield _means(part_losses(model, part, losses, precision), counts)  # and keep no reference to the graph


def _means(losses: dict[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    return {task: loss / n if (n := counts.get(task, 1)) > 1 else loss for task, loss in losses.items()}


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
