"""The update of an aggregator, alone or behind a loss weighting."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.aggregator import Aggregator, GramianAggregator
from recon.methods.bases.zero_gradients import with_meaning
from recon.methods.composition import Composition
from recon.methods.gradients.gramians import gramian
from recon.methods.gradients.jacobian import TaskJacobian, write_combination, write_own, write_update
from recon.methods.updates.scaled_losses import unscaled
from recon.methods.updates.weighted import in_order, weigh


def apply_aggregator(method: Aggregator, jacobian: TaskJacobian, loss_scale: Tensor | None) -> dict[str, Tensor]:
    """The aggregator's update; what one task alone reaches gets the task's gradient as it is."""
    if not jacobian.tasks:
        return {}
    if isinstance(method, GramianAggregator):
        products = unscaled(gramian(jacobian), loss_scale, power=2)
        vector = method.weights(products, tasks=jacobian.tasks)
        weights = with_meaning(dict(zip(jacobian.tasks, vector, strict=True)), products.diagonal().sqrt())
        write_combination(jacobian, vector)
    else:
        weights = _write_combined(method, jacobian, loss_scale)
    write_own(jacobian)
    return weights


def apply_composition(
    method: Composition, losses: Mapping[str, Tensor], jacobian: TaskJacobian, loss_scale: Tensor | None
) -> dict[str, Tensor]:
    """The aggregator's update of the weighted task gradients; what one task alone reaches gets the task's weight."""
    scales = weigh(method.weighting, losses, jacobian.tasks, jacobian.matrix.device)
    if not scales:
        return {}
    scale = in_order(scales, jacobian.tasks)
    if isinstance(method.aggregator, GramianAggregator):
        products = unscaled(gramian(jacobian), loss_scale, power=2)
        vector = method.gramian_weights(products, scale, jacobian.tasks)
        weights = with_meaning(dict(zip(jacobian.tasks, vector, strict=True)), products.diagonal().sqrt())
        write_combination(jacobian, vector)
    else:
        jacobian.matrix.mul_(scale.to(jacobian.matrix)[:, None])  # what was recorded of them is recorded
        further = _write_combined(method.aggregator, jacobian, loss_scale)
        weights = {task: scales[task] * weight for task, weight in further.items() if task in scales}
    write_own(jacobian, dict(zip(jacobian.tasks, scale, strict=True)))
    return {task: weight for task, weight in weights.items() if task in scales}


def _write_combined(method: Aggregator, jacobian: TaskJacobian, loss_scale: Tensor | None) -> dict[str, Tensor]:
    """Of a method that needs the gradients themselves."""
    if method.keeps_columns and jacobian.rows:
        shapes = ", ".join(" x ".join(map(str, table.shape)) for table in jacobian.rows)
        raise UsageError(
            f"Method {method.name!r} keeps a number for every shared parameter from step to step, but the gradients of "
            f"the embeddings of {shapes} are sparse: those of the rows that a step looked up, others in every step. "
            "Choose another method, or make these embeddings with sparse=False."
        )
    if loss_scale is None:
        update, weights = method.combine(jacobian.matrix, jacobian.tasks)
    else:
        factor = loss_scale.to(jacobian.matrix)
        update, weights = method.combine(jacobian.matrix.div_(factor), jacobian.tasks)
        update = update * factor
    lengths = torch.linalg.vector_norm(jacobian.matrix, dim=1) if weights else update
    write_update(jacobian, update)
    return with_meaning(weights, lengths) if weights else weights
