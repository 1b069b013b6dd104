"""Packed and padded sequences on fans: their values may differ between tasks, their lengths do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from recon.branching.fans.value import FanShell


def map_packing(
    map_groups: Callable[..., Any], call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """`fan.map_groups` for a function of values and lengths whose second result depends on the lengths only.

    All groups get the first group's second result: recurrent layers read it as Python numbers, which a fan cannot be.
    """
    if any(isinstance(arg, FanShell) for arg in args[1:]):
        return map_groups(call, args, kwargs)
    lengths: list[Tensor] = []

    @wraps(call)
    def of_group(*group_args: Any, **group_kwargs: Any) -> Any:
        values, found = call(*group_args, **group_kwargs)
        lengths.append(found)
        return values, lengths[0]

    return map_groups(of_group, args, kwargs)
