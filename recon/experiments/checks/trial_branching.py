"""Branch copies of a model, to see whether its forward can work on values that differ between tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recon.branching import BranchPlan, convert
from recon.branching.plan import Mode
from recon.errors import FanError

_SECONDS = 5.0  # to be spent on finding out from which layer on a model can be branched


@dataclass(frozen=True)
class Trial:
    """How branching went: the refusal, if there was one, and the layers that can be branched all the same."""

    refusal: Exception | None
    layers: tuple[str, ...]
    per_task: Exception | None = None  # the refusal in mode `per-task`, where `fan` was tried and refused


def try_branching(model: nn.Module, layers: Sequence[str], tasks: Sequence[str], inputs: Any, mode: Mode) -> Trial:
    """Branch a copy of the model at all of these layers, and where that fails, at the later ones only.

    Half of the tasks get a copy, and half the other: what cannot work on two values cannot on more.

    Args:
        model: the plain model.
        layers: in model order.
        tasks: at least two.
        inputs: those of a few samples.
        mode: see `recon.convert`.
    """
    refusal = _refusal(model, layers, tasks, inputs, mode)
    if not isinstance(refusal, FanError):
        return Trial(refusal, () if refusal else tuple(layers))
    begun = time.monotonic()
    fails, works = 0, len(layers)  # branching fails from the one on, and works from the other on
    while works - fails > 1 and time.monotonic() - begun < _SECONDS:
        middle = (fails + works) // 2
        if _refusal(model, layers[middle:], tasks, inputs, mode) is None:
            works = middle
        else:
            fails = middle
    return Trial(refusal, tuple(layers[works:]), _refusal(model, layers, tasks, inputs, "per-task"))


def _refusal(
    model: nn.Module, layers: Sequence[str], tasks: Sequence[str], inputs: Any, mode: Mode
) -> Exception | None:
    groups = [list(tasks[0::2]), list(tasks[1::2])]
    try:
        convert(model, BranchPlan.grouped(dict.fromkeys(layers, groups), tasks), inputs, mode=mode)
    except Exception as error:
        return error
    return None
