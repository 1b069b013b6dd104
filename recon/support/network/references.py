"""Replace modules that a model holds outside its children: in plain attributes, lists, dicts, bound methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn

# Where torch keeps children, state and hooks.
STRUCTURE = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def replace_references(value: Any, new: Callable[[nn.Module], nn.Module]) -> Any:
    """`value` with `new(module)` in the place of every module in it; `value` itself where nothing changes.

    A forward that loops over `self.stages = [self.conv1, self.conv2]` runs the modules of that list.
    """
    if isinstance(value, nn.Module):
        return new(value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        owner = new(value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if type(value) in (list, tuple):
        items = [replace_references(item, new) for item in value]
        same = all(item is old for item, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if type(value) is dict:
        replaced = {key: replace_references(item, new) for key, item in value.items()}
        return value if all(replaced[key] is item for key, item in value.items()) else replaced
    return value


def redirect_references(modules: Iterable[nn.Module], new: Callable[[nn.Module], nn.Module]) -> None:
    """Let the attributes of `modules` refer to `new(module)` wherever they refer to a module."""
    for module in modules:
        for name, value in vars(module).items():
            if name not in STRUCTURE:
                vars(module)[name] = replace_references(value, new)
