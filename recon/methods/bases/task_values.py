"""An option that holds a number for each task: `0.3/1.7` or `seg:0.3/depth:1.7`; in Python a sequence or a dict too.

A number may be a logarithm: `log(10)` is the first loss of a classifier that knows nothing of its ten classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from recon.errors import UnknownNameError, UsageError

TaskValues = str | float | Mapping[str, float] | Sequence[float]


def read_values(values: TaskValues, option: str, least: float = 0.0) -> dict[str, float] | list[float]:
    """The numbers by name, or in the order of the tasks, none below `least`; `option` is what errors call them."""
    given = _parse(values, option) if isinstance(values, str) else values
    if isinstance(given, Mapping):
        return {task: _number(value, option, least) for task, value in given.items()}
    return [_number(value, option, least) for value in (given if isinstance(given, Iterable) else [given])]


def values_by_task(
    numbers: Mapping[str, float] | Sequence[float], tasks: Sequence[str], option: str
) -> dict[str, float]:
    """The numbers by task, one for each; what was given by name may leave tasks out."""
    if not isinstance(numbers, Mapping):
        if len(numbers) != len(tasks):
            raise UsageError(
                f"There are {len(numbers)} {option} for the {len(tasks)} tasks {list(tasks)}. Give one for each, in "
                f"this order, or by name: {'/'.join(f'{task}:1' for task in tasks)}."
            )
        return dict(zip(tasks, numbers, strict=True))
    for task in numbers:
        if task not in tasks:
            raise UnknownNameError("task", task, tasks)
    return dict(numbers)


def _parse(text: str, option: str) -> dict[str, str] | list[str]:
    items = [item.rpartition(":") for item in text.split("/")]
    names = [name.strip() for name, colon, _ in items if colon]
    numbers = [number.strip() for _, _, number in items]
    if names and len(set(names)) < len(items):
        raise UsageError(
            f"Cannot read the {option} {text!r}. Expected a number for each task in order, as in 0.3/1.7, or every "
            "task by name and once, as in seg:0.3/depth:1.7."
        )
    return dict(zip(names, numbers, strict=True)) if names else numbers


def _number(value: object, option: str, least: float) -> float:
    logarithm = re.fullmatch(r"log\((\d+)\)", value.strip()) if isinstance(value, str) else None
    try:
        number = math.log(int(logarithm[1])) if logarithm else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        bound = f" of at least {least:g}" if math.isfinite(least) else ""
        raise UsageError(f"The {option} must be finite numbers{bound}, separated by '/', but one is {value!r}.")
    return number
