"""Add methods and attributes to a module's class; the module stays an instance of the user's class."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn


class Surgery(NamedTuple):
    """What `operate` adds to a user's class."""

    mixins: tuple[type[nn.Module], ...] = ()  # their methods go before the user's own
    # what `function(module, name)` computes, even if the module has it
    attributes: tuple[tuple[str, Callable[[nn.Module, str], Any]], ...] = ()


def operate(module: nn.Module, surgery: Surgery) -> None:
    """Give a module's class these mixins and attributes, beside those that it has from earlier calls."""
    done: Surgery = vars(type(module)).get("_surgery", Surgery())
    both = Surgery(done.mixins + surgery.mixins, done.attributes + surgery.attributes)
    module.__class__ = _surgical_class(original_class(module), both)  # type: ignore[arg-type]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any surgery; a parametrization that came later stays."""
    return _without_surgery(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _surgical_class(cls: type[nn.Module], surgery: Surgery) -> type[nn.Module]:
    fields = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduce,
        "_surgery": surgery,
    }
    attributes = {name: _property(name, function) for name, function in surgery.attributes}
    return type(cls.__name__, (*surgery.mixins, cls), {**attributes, **fields})


def _property(name: str, function: Callable[[nn.Module, str], Any]) -> property:
    def read(module: nn.Module) -> Any:  # not a partial: torch.compile needs a function
        return function(module, name)

    return property(read)


@lru_cache(maxsize=1024)
def _without_surgery(cls: type) -> type[nn.Module]:
    if "_surgery" in vars(cls):
        return cls.__bases__[-1]
    if not hasattr(cls, "_surgery"):
        return cls
    # torch.nn.utils.parametrize, say, derives a class from what it finds.
    fields = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(_without_surgery, cls.__bases__)), fields)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # Pickle would look for the class by its name, and find the original.
    cls, surgery = original_class(module), vars(type(module))["_surgery"]
    return _new, (cls, surgery), object.__reduce_ex__(module, protocol)[2]


def _new(cls: type[nn.Module], surgery: Surgery) -> nn.Module:
    module: nn.Module = object.__new__(_surgical_class(cls, surgery))  # type: ignore[arg-type]
    return module
