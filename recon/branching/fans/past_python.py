"""What takes a tensor to C++ without asking `__torch_function__`. Importing this module makes it ask."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recon.branching.fans.fan import TaskFan
from recon.branching.fans.statement import where
from recon.branching.fans.unmappable import refuse_backward
from recon.branching.fans.value import fans_in
from recon.branching.fans.writes import assign_data
from recon.errors import FanError


def _take_over_data() -> None:
    """Let `tensor.data = fan` be a write like any other.

    torch asks the tensor that is assigned to, not the value: the tensor would take over that a fan has no memory of
    its own. As with `Function.apply`, there is no hook, and what has no fan in it is passed on as it is.
    """
    original: Any = torch._C.TensorBase.data  # a descriptor: `Tensor.data` where nobody else has replaced it

    def assign(tensor: Tensor, value: Any) -> None:
        if type(value) is TaskFan and type(tensor) is not TaskFan:
            assign_data(tensor, value, original.__set__)
        else:
            original.__set__(tensor, value)

    Tensor.data = property(original.__get__, assign, original.__delete__, original.__doc__)  # type: ignore[assignment]


def _take_over_exports(module: ModuleType, name: str) -> None:
    """Let a function that hands out a tensor's memory refuse fans, which have none."""
    original: Callable[..., Any] = getattr(module, name)

    @wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        if any(type(value) is TaskFan for value in (*args, *kwargs.values())):
            raise FanError(
                f"{name}() reads the value of a tensor that differs between tasks{where()}: who takes it sees only one "
                "of the values. Use a tensor operation there, or branch later layers only."
            )
        return original(*args, **kwargs)

    setattr(module, name, export)


def _take_over_backward() -> None:
    """Let `torch.autograd.backward(fan)` ask, as `fan.backward()` and `torch.autograd.grad` do."""
    original = torch.autograd.backward

    @wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if fans_in((tensors, args, kwargs)):
            refuse_backward()
        original(tensors, *args, **kwargs)

    torch.autograd.backward = backward


_take_over_data()
_take_over_backward()
for _module in (torch, torch.utils.dlpack):
    _take_over_exports(_module, "to_dlpack")
