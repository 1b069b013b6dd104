"""Custom autograd functions on values that differ between tasks. Importing this module makes them work."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from recon.branching.fans.fan import TaskFan, map_groups
from recon.branching.fans.statement import where
from recon.branching.fans.value import fans_in
from recon.errors import FanError


def _take_over_apply() -> None:
    """Let `MyFunction.apply(fan)` map over the groups.

    `apply` hands its tensors to C++ without asking `__torch_function__`: the values would come out right, but
    without their gradient. torch has no hook there. Taking `apply` over only while a branched model runs would miss
    what activation checkpointing runs again in the backward, so it is taken over for good; calls without fans
    are passed on as they are. What slips by, the dry runs of the conversion find.
    """
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ == "_NoopSaveInputs" or not fans_in((args, kwargs)):  # checkpointing keeps its inputs by it
            return call(cls, *args, **kwargs)
        return map_groups(lambda *a, **k: call(cls, *a, **k), args, kwargs)

    def call(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        result = original.__get__(None, cls)(*args, **kwargs)
        if torch.is_grad_enabled() and any(type(leaf) is TaskFan for leaf in tree_leaves(result)):
            raise FanError(
                f"Values fan out inside {cls.__name__}{where()}, which loses their gradient. Use "
                "checkpoint(..., use_reentrant=False) if this is activation checkpointing; otherwise branch later "
                "layers only."
            )
        return result

    Function.apply = classmethod(apply)


_take_over_apply()
