"""The registry of gradient methods: by name, with options, from code or from the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from recon.errors import UnknownNameError, UsageError
from recon.methods.base import Aggregator, FeatureMethod, Method, Weighting

M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class MethodEntry:
    """What is known about a method before it is made.

    Args:
        name: what `get` and the command line call it.
        family: "weighting" (weighs losses, one backward pass), "aggregator" (combines gradients, T passes) or "feature
            method" (works on the gradients of shared features).
        title: the method's full name.
        paper: authors, venue, arXiv number and the equation or algorithm.
        scale: one sentence on the length of the update, compared with the sum of the task gradients.
        options: `{option: default}`.
    """

    name: str
    family: str
    title: str
    paper: str
    scale: str
    options: dict[str, Any]

    def describe_options(self) -> str:
        """The options with their defaults, as they are written on the command line."""
        return ", ".join(f"{option}={default}" for option, default in self.options.items()) or "none"


_methods: dict[str, tuple[MethodEntry, type[Method]]] = {}


def register(name: str, *, title: str, paper: str, scale: str) -> Callable[[type[M]], type[M]]:
    """Adds a method; decorates a subclass of `Weighting`, `Aggregator` or `FeatureMethod`.

    The options are the parameters of the class's `__init__`, each of which needs a default.

    Args:
        name: what `get` and the command line call it: letters, digits, '_' and '-'.
        title: see `MethodEntry`; so are `paper` and `scale`.
        paper: where the method comes from.
        scale: the length of its update.

    Raises:
        UsageError: the name is taken or cannot be written on a command line, the class is none of these,
            or one of its parameters has no default.
    """

    def decorate(cls: type[M]) -> type[M]:
        if name in _methods:
            raise UsageError(f"There is already a method named {name!r}. Choose another name.")
        if not name.replace("-", "_").isidentifier():
            raise UsageError(f"A method's name is made of letters, digits, '_' and '-', but got {name!r}.")
        entry = MethodEntry(name, _family(cls), title, paper, scale, _options(cls))
        cls.name = name
        _methods[name] = entry, cls
        return cls

    return decorate


def names() -> list[str]:
    """The names of all methods, in the order in which they were registered."""
    return list(_methods)


def entry(name: str) -> MethodEntry:
    """What is known about a method.

    Raises:
        UnknownNameError: there is no such method.
    """
    return _find(name)[0]


def get(name: str, /, **options: Any) -> Method:
    """Makes a method.

    Args:
        name: one of `names()`.
        options: see the method's `entry(name).options`.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: an option that the method does not have, or a value that it cannot take.
    """
    known, cls = _find(name)
    return cls(**{option: _fitting(known, option, value) for option, value in options.items()})


def parse(text: str) -> Method:
    """Makes a method from its form on the command line, as in `"cagrad:c=0.4,rescale=true"`.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: the text is malformed, or an option does not fit.
    """
    name, colon, tail = text.partition(":")
    options: dict[str, Any] = {}
    for item in tail.split(",") if colon else ():
        option, _, value = (part.strip() for part in item.partition("="))
        if not option.isidentifier() or not value or option in options:
            raise UsageError(
                f"Cannot read {item!r} in the method {text!r}. "
                "Expected 'name' or 'name:option=value,option=value', every option once."
            )
        options[option] = _literal(value)
    return get(name.strip(), **options)


def _find(name: str) -> tuple[MethodEntry, type[Method]]:
    if name not in _methods:
        raise UnknownNameError("method", name, _methods)
    return _methods[name]


def _family(cls: type[Method]) -> str:
    if issubclass(cls, Weighting):
        return "weighting"
    if issubclass(cls, Aggregator):
        return "aggregator"
    if issubclass(cls, FeatureMethod):
        return "feature method"
    raise UsageError(
        f"A method is a subclass of Weighting, Aggregator or FeatureMethod, but {cls.__name__} is none of these."
    )


def _options(cls: type[Method]) -> dict[str, Any]:
    options = {}
    for option, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is parameter.empty:
            raise UsageError(f"Every option of a method needs a default, but {cls.__name__}'s {option!r} has none.")
        options[option] = parameter.default
    return options


def _fitting(known: MethodEntry, option: str, value: Any) -> Any:
    if option not in known.options:
        raise UsageError(f"Method {known.name!r} has no option {option!r}. Its options: {known.describe_options()}.")
    kind = type(known.options[option])
    # A bool is an int to Python, but seed=True or rescale=1 is a slip.
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind not in (int, float) and (isinstance(value, kind) or known.options[option] is None):
        return value
    raise UsageError(
        f"Option {option!r} of method {known.name!r} must be of type {kind.__name__}, but got {value!r}. "
        f"Its options: {known.describe_options()}."
    )


def _literal(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
