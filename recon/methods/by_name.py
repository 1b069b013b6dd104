"""Methods that `recon.backward` is given by name: made once for each model, and only those that remember nothing."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from recon.errors import UsageError
from recon.methods.bases.method import Method
from recon.methods.parsing import parse
from recon.methods.registry import edition

_made: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Method]] = WeakKeyDictionary()


def method_by_name(text: str, model: nn.Module, tasks: Sequence[str]) -> Method:
    """The method of this name that was made for the model, set up for these tasks at least.

    A method that keeps something is refused: nobody could save it, or give its parameters to an optimizer.
    """
    made = _made.setdefault(model, {})
    key = text, edition()
    method = made.get(key)
    if method is None or not set(tasks) <= set(method.tasks):
        known = () if method is None else method.tasks
        method = memoryless(text)
        method.setup(tuple(dict.fromkeys([*known, *tasks])))
        made[key] = method
    return method


def memoryless(text: str) -> Method:
    """A new method of this name, if it keeps nothing from step to step."""
    method = parse(text)
    if not method.memoryless:
        raise UsageError(_remembers(text))
    return method


def _remembers(text: str) -> str:
    make = f"recon.methods.{'parse' if ':' in text else 'get'}({text!r})"
    return (
        f"Method {text!r} may keep something from step to step, so its name alone is not enough. Make it once, "
        f"before the loop, and pass it: method = {make}. (A class of your own that keeps nothing says so: "
        "memoryless = True.)"
    )
