"""Problems by name: the built-in ones, and those in a user's module or file.

Importing this package does not import torch, so listing the problems is instant.
"""

from __future__ import annotations

import ast
import importlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ProblemError, UnknownNameError, UsageError
from recon.problems.options import check_options
from recon.support.importing import call_in_module, functions_of, import_target
from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.problems.problem import Metric, Problem, ReducedRun, Search, Task

__all__ = [
    "Metric",
    "Problem",
    "ReducedRun",
    "Search",
    "Task",
    "call_function",
    "descriptions",
    "get",
    "home_of",
    "names",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__, dict.fromkeys(("Metric", "Problem", "ReducedRun", "Search", "Task"), "problem")
    )

_HOME = "recon.problems.sets"
_BUILT_IN = {
    module.replace("_", "-"): module
    for module in (
        *("digits", "multi_fashion_mnist", "cityscapes", "nyuv2"),
        *("adult", "tox21", "celeba", "pascal_context"),
    )
}
"""A module of `_HOME` for each name: it has a function of its own name, and a `DESCRIPTION`."""

_HOW_TO_NAME_ONE = (
    "A problem of your own is named path/to/file.py:function or package.module:function, "
    "where the function returns a recon.Problem."
)


def names() -> list[str]:
    """The names of the built-in problems."""
    return list(_BUILT_IN)


def descriptions() -> dict[str, str]:
    """`{name: one line}` for every built-in problem."""
    return {name: _description(module) for name, module in _BUILT_IN.items()}


def _description(module: str) -> str:
    """The module's `DESCRIPTION`, read from its text: importing it would import torch."""
    text = resources.files(_HOME).joinpath(f"{module}.py").read_text(encoding="utf-8")
    constants = {
        ast.unparse(line.targets[0]): line.value for line in ast.parse(text).body if isinstance(line, ast.Assign)
    }
    description: str = ast.literal_eval(constants["DESCRIPTION"])
    return description


def get(spec: str, **options: Any) -> Problem:
    """The problem that `spec` names.

    Files are imported as `python path/to/file.py` would run them: with their own folder first on `sys.path`.

    Args:
        spec: a built-in name, `package.module:function`, or `path/to/file.py:function`; the function returns a
            `recon.Problem`. (Instead of the function, it can be a `recon.Problem`.)
        options: keyword arguments for the function; one that is None counts as not given. The command line passes
            `data_root`, the folder that holds the problem's data set, `train_samples`, how many training samples to
            use, and `pretrained`, a file of weights for its backbone. A function has those that it needs.

    Raises:
        UnknownNameError: there is no such problem, file, module or function; names the nearest ones.
        UsageError: `spec` has none of the three forms, or the function does not accept these options, or needs others.
        ProblemError: the user's code raised an exception (which is chained), or returned something else.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if spec in _BUILT_IN:
        module = _BUILT_IN[spec]
        make = getattr(importlib.import_module(f"{_HOME}.{module}"), module)
        check_options(spec, make, options)
        return make(**options)
    if ":" not in spec:
        raise UnknownNameError("problem", spec, names(), _HOW_TO_NAME_ONE)
    target, _, function = spec.rpartition(":")
    if not target or not function.isidentifier():
        raise UsageError(f"Problem {spec!r} does not end in ':function'. {_HOW_TO_NAME_ONE}")
    made = call_function(spec, **options)

    from recon.problems.problem import Problem  # late: it imports torch

    if not isinstance(made, Problem):
        raise ProblemError(f"{spec} must return a recon.Problem, but it returned {type(made).__name__}.")
    return made


def home_of(spec: str) -> str:
    """The file without its folders, or the module, that a problem comes from; a built-in one's name."""
    target, colon, _ = spec.rpartition(":")
    return Path(target).name if colon else spec


def call_function(spec: str, **options: Any) -> Any:
    """What the user's function `package.module:function` or `path/to/file.py:function` returns; see `get`."""
    target, _, function = spec.rpartition(":")  # the last colon: a Windows path has one of its own
    module = import_target(target)
    if not hasattr(module, function):
        raise UnknownNameError("function", function, functions_of(module), f"Looked in {target}.")
    check_options(spec, getattr(module, function), options)
    return call_in_module(module, function, options)
