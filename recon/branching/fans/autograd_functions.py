"""Make custom autograd functions map over fans: importing this module is all it takes."""

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

    `apply` passes its tensors to C++ without calling `__torch_function__`: the values would be right, but their
    gradient would be lost. torch has no hook there, so this replaces `apply`. It does so for good: activation
    checkpointing calls `apply` again in the backward, after the branched model has run. Calls without fans go to
    torch's own `apply`. The dry runs of `convert` find the calls that this misses.
    """
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ == "_NoopSaveInputs" or not fans_in((args, kwargs)):  # how checkpointing keeps its inputs
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
