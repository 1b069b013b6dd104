"""What a problem's models cost: for one sample, and one model for each task. Imports torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from recon import branching, methods, plans
from recon.branching.surgery.copies import copy_model
from recon.errors import FanError
from recon.experiments.inputs import few_samples
from recon.experiments.optimizers import make_optimizer
from recon.experiments.recipe import Recipe
from recon.plans import Costs
from recon.problems.problem import Problem
from recon.support.network.forward import Part, model_device
from recon.support.network.task_layers import tasks_by_layer
from recon.training.optimizers import as_one
from recon.training.updater import Updater

logger = logging.getLogger(__name__)


def costs_per_sample(model: nn.Module, inputs: Any) -> Costs:
    """What a model costs, its multiply-adds and activations for one sample."""
    inputs, samples = few_samples(inputs)
    return _per_sample(plans.costs(model, None, inputs), samples)


def single_task_costs(model: nn.Module, tasks: tuple[str, ...], inputs: Any) -> Costs:
    """What one model for each task costs, all together, its multiply-adds and activations for one sample.

    A single-task model is the backbone and its own head, without the other tasks' heads. T of those are what is left
    when every shared layer is branched, so that is what is counted.
    """
    inputs, samples = few_samples(inputs)
    shared = [name for name, using in tasks_by_layer(model, tasks, inputs).items() if len(using) > 1]
    plan = branching.BranchPlan.per_task(shared, tasks) if shared else None
    try:
        costs = plans.costs(model, plan, inputs)
    except FanError as error:
        logger.warning("Cannot leave the other tasks' heads out of the single-task costs: %s", error)
        costs = plans.costs(model, None, inputs)
        size = costs.activation_bytes
        costs = Costs(
            len(tasks) * costs.parameters, len(tasks) * costs.macs, None if size is None else len(tasks) * size
        )
    return _per_sample(costs, samples)


def _per_sample(costs: Costs, samples: int) -> Costs:
    size = costs.activation_bytes
    return replace(costs, macs=costs.macs // samples, activation_bytes=None if size is None else size // samples)


class TrainingStep:
    """Takes training steps of some tasks, all if not given, on a copy of the model and one batch, to be timed."""

    def __init__(
        self,
        problem: Problem,
        model: nn.Module,
        batch: Sequence[Part],
        method: str = "joint",
        tasks: Sequence[str] = (),
    ) -> None:
        self.model = copy_model(model).train()
        self.losses = problem.losses_of(tasks or problem.task_names)
        self.method = methods.parse(method)
        self.method.setup(self.losses.tasks)
        self.method.to(model_device(self.model))
        self.method.attach(self.model)
        self.update = Updater(self.model, self.losses, self.method)
        self.optimizer = as_one(make_optimizer(problem, self.model, Recipe()))
        self.parts = [part for part in batch if self.losses.present(part)]

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.update(self.parts)
        self.optimizer.step()
