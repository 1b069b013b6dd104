"""Calls that torch passes to C++ without `__torch_function__`: importing this module makes them respect fans."""

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
    """Make `tensor.data = fan` a write like any other.

    torch calls `__torch_function__` of the tensor that is assigned to, not of the value, so the tensor would lose its
    memory, as a fan has none. torch has no hook there; assignments without fans go to torch's own code.
    """
    original: Any = torch._C.TensorBase.data  # a descriptor: `Tensor.data` where nobody else has replaced it

    def assign(tensor: Tensor, value: Any) -> None:
        if type(value) is TaskFan and type(tensor) is not TaskFan:
            assign_data(tensor, value, original.__set__)
        else:
            original.__set__(tensor, value)

    Tensor.data = property(original.__get__, assign, original.__delete__, original.__doc__)  # type: ignore[assignment]


def _take_over_exports(module: ModuleType, name: str) -> None:
    """Make a function that returns a tensor's memory refuse fans, which have none."""
    original: Callable[..., Any] = getattr(module, name)

    @wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        if any(type(value) is TaskFan for value in (*args, *kwargs.values())):
            raise FanError(
                f"{name}() reads the value of a tensor that differs between tasks{where()}: its receiver would see "
                "only one of the values. Use a tensor operation there, or branch later layers only."
            )
        return original(*args, **kwargs)

    setattr(module, name, export)


def _take_over_backward() -> None:
    """Make `torch.autograd.backward(fan)` call `__torch_function__`, as `torch.autograd.grad` does."""
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
