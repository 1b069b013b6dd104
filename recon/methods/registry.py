"""The registry of gradient methods: by name, with options, from code or from the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from recon.errors import UnknownNameError, UsageError
from recon.methods.bases.aggregator import Aggregator
from recon.methods.bases.feature_method import FeatureMethod
from recon.methods.bases.method import Method
from recon.methods.bases.weighting import Weighting
from recon.methods.composition import compose
from recon.methods.functions import method_class

D = TypeVar("D", bound=Callable[..., Any])


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


Known = tuple[MethodEntry, type[Method]]

_methods: dict[str, Known] = {}
_edition = 0


def register(name: str, *, title: str = "", paper: str = "", scale: str = "") -> Callable[[D], D]:
    """Adds a method: decorates a subclass of `Weighting`, `Aggregator` or `FeatureMethod`, or a function.

    What a function can be: see `functions.method_class`.

    The options are the parameters of the class's `__init__`, or those of the function after the first; each needs a
    default. A definition that is executed again, for example in a notebook, replaces the earlier one. A class that
    keeps nothing from step to step says so (`memoryless = True`), and may be given to `recon.backward` by its name.

    Args:
        name: what `get` and the command line call it: letters, digits, '_' and '-'.
        title: see `MethodEntry`; so are `paper` and `scale`. The docstring's first line when not given.
        paper: where the method comes from.
        scale: the length of its update.

    Raises:
        UsageError: the name is taken or cannot be written on a command line, what is decorated is none of the classes
            above nor a function of `J`, `gramian` or `losses`, or one of its options has no default.
    """

    def decorate(definition: D) -> D:
        if not name.replace("-", "_").isidentifier():
            raise UsageError(f"A method's name is made of letters, digits, '_' and '-', but got {name!r}.")
        known = describe(definition, name, title, paper, scale)
        if name in _methods and _origin(known[1]) != _origin(_methods[name][1]):
            raise UsageError(f"There is already a method named {name!r}. Choose another name.")
        known[1].name = name
        _methods[name] = known
        global _edition
        _edition += 1
        return definition

    return decorate


def describe(definition: Any, name: str, title: str = "", paper: str = "", scale: str = "") -> Known:
    """The entry of a method that may not be registered, and its class."""
    cls = method_class(definition) if inspect.isfunction(definition) else definition
    family = _family(cls)
    first_line = (inspect.getdoc(definition) or name).splitlines()[0]
    return MethodEntry(name, family, title or first_line, paper, scale, _options(cls)), cls


def names() -> list[str]:
    """The names of all methods, in the order in which they were registered."""
    return list(_methods)


def edition() -> int:
    """How many definitions were registered so far: what was made by its name before may have another one by now."""
    return _edition


def entry(name: str) -> MethodEntry:
    """What is known about a method.

    Raises:
        UnknownNameError: there is no such method.
    """
    return find(name)[0]


def find(name: str) -> Known:
    """What is known about a method, and its class."""
    if name not in _methods:
        hint = "Options go to parse('name:option=value') or get('name', option=value)." if ":" in name else ""
        raise UnknownNameError("method", name, _methods, hint)
    return _methods[name]


def get(name: str, /, **options: Any) -> Method:
    """Makes a method.

    Args:
        name: one of `names()`, or a weighting and an aggregator as in `"uw+pcgrad"`.
        options: see the method's `entry(name).options`. Those of a composition's parts are given to `parse`.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: an option that the method does not have, or a value that it cannot take.
    """
    if "+" not in name:
        return make(*find(name), options)
    if options:
        raise UsageError(
            f"Options of {name!r} belong to one of its parts: write them there, as in "
            "recon.methods.parse('dwa:temperature=1+cagrad:c=0.4')."
        )
    return compose([get(part) for part in name.split("+")])


def make(known: MethodEntry, cls: type[Method], options: Mapping[str, Any]) -> Method:
    """Makes a method from what `find` or `describe` gave."""
    method = cls(**{option: _fitting(known, option, value) for option, value in options.items()})
    method.name = method.name or known.name
    return method


def _origin(cls: type[Method]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _family(cls: Any) -> str:
    if inspect.isclass(cls) and issubclass(cls, Weighting):
        return "weighting"
    if inspect.isclass(cls) and issubclass(cls, Aggregator):
        return "aggregator"
    if inspect.isclass(cls) and issubclass(cls, FeatureMethod):
        return "feature method"
    what = cls.__name__ if inspect.isclass(cls) else f"a {type(cls).__name__}"
    raise UsageError(
        "A method is a subclass of Weighting, Aggregator or FeatureMethod, or a function of J, gramian or losses, but "
        f"{what} is none of these."
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
