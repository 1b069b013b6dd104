"""The optimizer and the schedule that a recipe asks for. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from recon.errors import ProblemError, UsageError
from recon.experiments.recipe import Recipe
from recon.problems.problem import Problem
from recon.support.network.forward import Batch
from recon.support.network.tables import sparse_tables

MakeScheduler = Callable[[Optimizer], LRScheduler]

_ONE_CYCLE_RISE = 0.3  # of the steps, torch's default

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(problem: Problem, model: nn.Module, recipe: Recipe) -> Optimizer | list[Optimizer]:
    """The recipe's optimizer, or the problem's with the recipe's settings.

    Adam and AdamW take no sparse gradients: beside them, embeddings with `sparse=True` get a SparseAdam with the same
    learning rate, which knows no weight decay.
    """
    make = problem.make_optimizer if recipe.optimizer is None else _OPTIMIZERS[recipe.optimizer]
    optimizer = _set(make(model.parameters()), problem, recipe)
    tables = set(sparse_tables(model))
    if not tables or not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return optimizer
    rest = _set(make(p for p in model.parameters() if p not in tables), problem, recipe)
    options = {name: rest.defaults[name] for name in ("lr", "betas", "eps")}
    return [torch.optim.SparseAdam([p for p in model.parameters() if p in tables], **options), rest]


def _set(optimizer: Optimizer, problem: Problem, recipe: Recipe) -> Optimizer:
    """Give it the recipe's settings."""
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(recipe, name)
        if value is None:
            continue
        if name not in optimizer.defaults:
            raise UsageError(
                f"The optimizer of {problem.name!r} is {type(optimizer).__name__}, which has no {name}. Choose "
                f"one that has, such as sgd, or leave {name} out."
            )
        for settings in [optimizer.defaults, *optimizer.param_groups]:
            settings[name] = value
    return optimizer


def make_scheduler(
    problem: Problem, loader: Iterable[Batch], epochs: int, recipe: Recipe | None = None
) -> MakeScheduler | None:
    """A function that makes the optimizer's scheduler, which is stepped after every optimizer step; None without one.

    Refused are settings that do not go together, and a warm-up that leaves no steps, or goes beyond a milestone.
    """
    recipe = recipe or Recipe()
    recipe.check(epochs)
    if not depends_on_length(problem, recipe):
        if recipe.warm_up is not None and recipe.accumulate != "tasks" and isinstance(loader, Sized):
            _warm_up_steps(recipe, epochs * _steps_per_epoch(problem, loader, recipe))
        return None if recipe.warm_up is None else partial(_rising, steps=int(recipe.warm_up))
    per_epoch = _steps_per_epoch(problem, loader, recipe)
    total = epochs * per_epoch
    rise = _warm_up_steps(recipe, total)
    if recipe.schedule == "one-cycle":  # rises by itself
        return partial(_one_cycle, total=total, rise=rise / total if rise else _ONE_CYCLE_RISE)
    main = _main_schedule(problem, recipe, per_epoch, total, rise)
    if main is None or not rise:
        return partial(_rising, steps=rise) if rise else main
    return lambda optimizer: SequentialLR(optimizer, [_rising(optimizer, rise), main(optimizer)], [rise])


def depends_on_length(problem: Problem, recipe: Recipe) -> bool:
    """Whether a longer training has different learning rates."""
    own = problem.make_scheduler is not None if recipe.schedule is None else recipe.schedule != "constant"
    return own or isinstance(recipe.warm_up, float)


def _steps_per_epoch(problem: Problem, loader: Iterable[Batch], recipe: Recipe) -> int:
    if not isinstance(loader, Sized):
        raise ProblemError(
            f"The learning rate's schedule needs the number of steps, but the train loader of {problem.name!r} has no "
            "length. Give it a __len__, or choose the schedule constant."
        )
    if recipe.accumulate == "tasks":
        raise UsageError(
            "The learning rate's schedule needs the number of steps, but accumulate='tasks' gathers as many batches "
            "for a step as it takes to see every task. Choose the schedule constant, or give each task a loader of its "
            "own, and join them: recon.joint_loader({'task name': loader, ...})."
        )
    return -(-len(loader) // recipe.accumulate)


def _warm_up_steps(recipe: Recipe, total: int) -> int:
    asked = recipe.warm_up or 0
    steps = asked if isinstance(asked, int) else max(1, round(asked * total))
    if steps >= total:
        raise UsageError(
            f"A warm-up of {asked} would take all {total} steps of the training. Choose fewer steps, or a share of all "
            "steps, such as 0.05."
        )
    return steps


def _main_schedule(problem: Problem, recipe: Recipe, per_epoch: int, total: int, rise: int) -> MakeScheduler | None:
    """The schedule after `rise` steps of warm-up; its own steps count from there."""
    if recipe.schedule == "constant":
        return None
    if recipe.schedule == "cosine":
        return partial(CosineAnnealingLR, T_max=total - rise)
    if recipe.schedule == "step":
        milestones = [epoch * per_epoch - rise for epoch in recipe.milestones]
        if milestones[0] <= 0:
            raise UsageError(
                f"The warm-up takes {rise} steps, but the first milestone comes after {milestones[0] + rise} steps. "
                "Warm up for fewer steps, or choose later milestones."
            )
        return partial(MultiStepLR, milestones=milestones, gamma=0.1 if recipe.gamma is None else recipe.gamma)
    factory = problem.make_scheduler
    return None if factory is None else lambda optimizer: factory(optimizer, total - rise)


def _rising(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The k-th of n steps takes the k/n-th part of the learning rate."""
    return LinearLR(optimizer, 1 / steps, total_iters=max(1, steps - 1))


def _one_cycle(optimizer: Optimizer, total: int, rise: float) -> LRScheduler:
    peaks = [group["lr"] for group in optimizer.param_groups]
    # The momentum stays as the user set it.
    return OneCycleLR(optimizer, peaks, total, pct_start=rise, cycle_momentum=False)
