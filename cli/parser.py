"""What the verbs' argument parsers have in common. Nothing here imports torch."""

from __future__ import annotations

import argparse
import math
import os
import re
import textwrap
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from recon.errors import UsageError

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction["Parser"]

METHOD = (
    "a gradient method (see `recon methods`), with options as in cagrad:c=0.5; a weighting and an aggregator as in "
    "uw+pcgrad; your own as path/to/file.py:function or package.module:function"
)


@dataclass(frozen=True)
class Report:
    """What a verb prints on stdout in the end: `text`, or with --json `data` as one object.

    `failed`: the exit code is 1, since what was asked for is not so.
    """

    text: str
    data: dict[str, Any]
    failed: bool = False


Run = Callable[[argparse.Namespace], Report]


class CommandLineError(UsageError):
    """A command line that the parser cannot make sense of."""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that `--json` covers mistakes on the command line too."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise CommandLineError(f"{message.rstrip('.')}. See `{self.prog} --help`.")

    def option_names(self) -> list[str]:
        """Every option that the parser knows."""
        return re.findall(r"--[\w-]+", self.format_usage())


def add_verb(verbs: Verbs, name: str, run: Run, summary: str, examples: str, details: str = "") -> Parser:
    """Add a verb: its `summary` for `recon --help`, `details` and `examples`, one a line, for `recon VERB --help`."""
    indented = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    parser = verbs.add_parser(
        name,
        help=summary,
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {details}", 100),
        epilog=f"examples:\n{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, errors included")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def command_words(args: argparse.Namespace, names: Container[str] | None = None) -> list[str]:
    """The words of a command line that give the arguments of these names, but for those that are as by default.

    Without names, they give all but `--resume`.
    """
    words = []
    for action in args.parser._actions:
        value = getattr(args, action.dest, action.default)
        asked = action.dest != "resume" if names is None else action.dest in names
        if value == action.default or not asked:
            continue
        repeated = isinstance(action, argparse._AppendAction)
        for values in value if repeated else [value]:
            words += action.option_strings[-1:]
            if action.nargs != 0:
                words += map(_word, values) if isinstance(values, list) else [_word(values)]
    return words


def _word(value: Any) -> str:
    if isinstance(value, tuple):  # OLD=NEW
        return "=".join(value)
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)


def add_training_options(parser: Parser) -> None:
    """What profiling and training have in common."""
    parser.add_argument("--seed", type=seed, default=0, help="seed of the initial weights and the loaders (default: 0)")
    parser.add_argument("--lr", type=positive_number, help="learning rate (default: the problem's own)")
    add_device_option(parser)


def add_device_option(parser: Parser) -> None:
    """Where the model runs."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one, else cpu)"
    )


def any_path(text: str) -> Path:
    """An argument that names a file or a folder."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds the character NUL, which no name can")
    return Path(not_empty(text))


def not_empty(text: str) -> str:
    """An argument that may name a file or a folder, or something else."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name (the current folder is '.')")
    return text


def file_path(text: str) -> Path:
    """An argument that names a file to write."""
    found = any_path(text)
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} names a folder; give the name of a file")
    return found


def positive_integer(text: str) -> int:
    """An argument that counts something."""
    return _number(text, int, lambda value: value > 0, "a whole number of at least 1")


def seed(text: str) -> int:
    """A random seed that torch and numpy accept."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")


def positive_number(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def non_negative_number(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def part_below_one(text: str) -> float:
    """A number from 0 up to, but not, 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def steps_or_part(text: str) -> int | float:
    """A number of steps, or a part of all steps."""
    if text.isdecimal():
        return positive_integer(text)
    return _number(text, float, lambda value: 0 < value < 1, "a whole number of at least 1, or a part between 0 and 1")


def batches_or_tasks(text: str) -> int | str:
    """A number of batches for one step, or `tasks`."""
    return text if text == "tasks" else _number(text, int, lambda n: n >= 1, "a whole number of at least 1, or tasks")


def share(text: str) -> float:
    """An argument that is a part of a whole."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def floor(text: str) -> int | str:
    """Profiled steps from one noise floor to the next; or `auto`, or `off`."""
    if text in ("off", "auto"):
        return text
    return _number(text, int, lambda value: value >= 2, "a whole number of at least 2, auto or off")


def threshold(text: str) -> float:
    """A conflict threshold S on the 0.01 grid."""
    from recon.maps.counts import threshold_bin  # late: it imports numpy

    value = _number(text, float, math.isfinite, "a number")
    try:
        threshold_bin(value)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return value


def _number(text: str, kind: type, accept: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def two_tasks(text: str) -> tuple[str, ...]:
    """Two or more task names, as in `left,right`."""
    tasks = tuple(part.strip() for part in text.split(","))
    if len(tasks) < 2 or len(set(tasks)) < len(tasks) or not all(tasks):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of two or more different tasks, as in left,right")
    return tasks
