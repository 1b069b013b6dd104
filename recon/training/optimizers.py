"""The optimizers of a training: one, or several that step as one; and their schedulers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from recon.errors import UsageError, shortened
from recon.methods import Method

logger = logging.getLogger(__name__)

_NAMED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)

SchedulerOrMaker = LRScheduler | Callable[[Optimizer], LRScheduler]
"""A scheduler, or a function that makes one of an optimizer."""


class Together:
    """Several optimizers, or several schedulers, that step one after the other, as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all optimizers, in order."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """See `torch.optim.Optimizer.zero_grad`."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """A step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for part, its_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its_state)


def parts_of(stepping: Any) -> tuple[Any, ...]:
    """The optimizers (schedulers) that step as this one; it alone, if it is a single one."""
    return stepping.parts if isinstance(stepping, Together) else (stepping,)


def name_of(stepping: Any) -> str:
    """The class, or the classes, in words."""
    return " + ".join(type(part).__name__ for part in parts_of(stepping))


def as_one(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer | Together:
    """One optimizer as it is, and several as one; refused if one of them is none, or needs more than gradients."""
    parts: Sequence[Any] = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not parts:
        raise UsageError("optimizer is an empty list. Pass the optimizer of the model's parameters, or several.")
    for part in parts:
        check_optimizer(part)
    return parts[0] if len(parts) == 1 else Together(parts)


def check_optimizer(optimizer: Any) -> None:
    """Refuse an object that is not an optimizer, and an optimizer whose step needs more than the gradients."""
    if isinstance(optimizer, LRScheduler):
        raise UsageError(
            f"optimizer is a learning rate scheduler ({type(optimizer).__name__}). Pass optimizer=scheduler.optimizer, "
            "scheduler=scheduler."
        )
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"optimizer is {optimizer!r}. Make one from the parameters, such as torch.optim.Adam(model.parameters())."
        )
    # Of its class: the step that a scheduler puts on the object shows the arguments of the class's function.
    _, *arguments = signature(type(optimizer).step).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind in _NAMED]
    if needed:
        raise UsageError(
            f"{type(optimizer).__name__}.step needs {', '.join(needed)}: such an optimizer computes the losses several "
            "times a step, with gradients each time. Use another, or write your own loop, with a closure that calls "
            "optimizer.zero_grad() and recon.backward(losses, model, method), and returns the sum of the losses."
        )


def check_parameters(optimizer: Optimizer | Together, model: nn.Module) -> None:
    """Refuse optimizers of another model, and a parameter that two of them would move; name those that none moves."""
    names = {p: name for name, p in model.named_parameters()}
    seen: set[Tensor] = set()
    for part in parts_of(optimizer):
        own = {p for group in part.param_groups for p in group["params"]}
        if own.isdisjoint(names):
            raise UsageError(
                f"The optimizer{f' {type(part).__name__}' if isinstance(optimizer, Together) else ''} has no parameter "
                "of this model: it was made for another one (recon.convert and recon.load return new models). Make a "
                "new one from model.parameters()."
            )
        twice = [names.get(p, "one that is not the model's") for p in own & seen]
        if twice:
            raise UsageError(
                f"Two optimizers have the parameters {shortened(sorted(twice))}, and each would move them. Give every "
                "parameter to one optimizer."
            )
        seen |= own
    left = [name for p, name in names.items() if p.requires_grad and p not in seen]
    if left:
        logger.warning(
            "No optimizer has the parameters %s: they get gradients, but stay as they are. Give them to one, or freeze "
            "them with requires_grad_(False).",
            shortened(left),
        )


def add_parameters(method: Method, optimizer: Optimizer | Together, scheduler: Any) -> None:
    """Give the parameters of a method that learns to the first optimizer that takes gradients which are not sparse."""
    known = {p for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in method.parameters() if p not in known]
    if not new:
        return
    parts = parts_of(optimizer)
    number = next((number for number, part in enumerate(parts) if not isinstance(part, SparseAdam)), None)
    if number is None:
        raise UsageError(
            f"Method {method.name!r} has parameters of its own, whose gradients are not sparse, as SparseAdam needs "
            "them. Add another optimizer: optimizer=[SparseAdam(...), Adam(...)]."
        )
    made = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
    if any(isinstance(one, LRScheduler) and (len(parts) == 1 or one.optimizer is parts[number]) for one in made):
        raise UsageError(
            f"Method {method.name!r} has parameters of its own, and a scheduler must know them from the start. Pass "
            "a function that makes the scheduler instead: scheduler=lambda optimizer: ...LR(optimizer, ...)."
        )
    group: dict[str, Any] = {"params": new}
    if "weight_decay" in parts[number].defaults:
        group["weight_decay"] = 0.0
    parts[number].add_param_group(group)


def schedulers_of(
    optimizer: Optimizer | Together, scheduler: SchedulerOrMaker | Sequence[SchedulerOrMaker | None] | None
) -> LRScheduler | Together | None:
    """The schedulers that step as one, made where they are not yet; a single function makes one of every optimizer."""
    parts = parts_of(optimizer)
    if isinstance(scheduler, LRScheduler):
        name = type(scheduler).__name__
        if len(parts) > 1:
            raise UsageError(
                f"The scheduler {name} is of one optimizer, but there are {len(parts)}. Pass a list with one for each, "
                "None for an optimizer without, or a function that makes one of each."
            )
        if getattr(scheduler, "optimizer", parts[0]) is not parts[0]:
            raise UsageError(
                f"The scheduler {name} is of another optimizer than the one that trains, whose learning rate would "
                "never change. Make it of this one."
            )
        return scheduler
    if scheduler is None:
        return None
    each: Sequence[Any] = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler] * len(parts)
    if len(each) != len(parts):
        raise UsageError(
            f"There are {len(each)} schedulers for {len(parts)} optimizers. Give one for each, in their order, "
            "None for an optimizer without; or one function, which makes one of each."
        )
    made: list[LRScheduler] = []
    for part, one in zip(parts, each, strict=True):
        if one is None:
            continue
        made.append(one if isinstance(one, LRScheduler) else one(part))
        if made[-1].optimizer is not part:
            raise UsageError(
                f"The scheduler {type(made[-1]).__name__} in place {len(made)} belongs to another optimizer than the "
                f"{type(part).__name__} in that place. Give the schedulers in the order of the optimizers."
            )
    return made[0] if len(made) == 1 else Together(made) if made else None


def take_step(optimizer: Optimizer | Together, model: nn.Module) -> None:
    """A step; gradients of a kind that an optimizer does not take are an error that names the parameters."""
    for part in parts_of(optimizer):
        try:
            part.step()
        except RuntimeError as error:
            if "sparse" not in str(error).lower():
                raise
            raise UsageError(_wrong_kind(part, model, error)) from error


def _wrong_kind(optimizer: Optimizer, model: nn.Module, error: RuntimeError) -> str:
    names = {p: name for name, p in model.named_parameters()}
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                kinds[p.grad.is_sparse].append(names.get(p, "one that is not the model's"))
    found = [f"{'sparse' if kind else 'dense'} for {shortened(own)}" for kind, own in kinds.items() if own]
    return (
        f"{type(optimizer).__name__} does not take these gradients: they are {', and '.join(found)} ({error}). Give "
        "embeddings with sparse=True to SparseAdam and everything else to another optimizer, "
        "optimizer=[SparseAdam(tables), Adam(others)], or all to SGD; or make the embeddings with sparse=False."
    )
