"""recon's exceptions, and how their messages are shortened and made safe to print."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST_WORD, _LONGEST_MESSAGE = 1000, 4000  # letters: deep paths stay whole
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
_MOST_COMPARED = 5000  # names compared to find the nearest one: difflib needs a second for this many


def printable(text: str, keep: str = "\n") -> str:
    """The text with control, escape and other invisible characters, but for `keep`, shown escaped: safe for a terminal.

    Names in a message may come from a file that somebody else wrote.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str, limit: int, gap: str = " ... ") -> str:
    """The text, without its middle if it is longer than `limit` letters: messages end with what to try."""
    if len(text) <= limit:
        return text
    kept = limit - len(gap)
    head = 2 * kept // 3
    return f"{text[:head]}{gap}{text[len(text) - (kept - head) :]}"


def readable(message: str) -> str:
    """A message of bounded length, safe for a terminal."""
    message = cut(message, 10 * _LONGEST_MESSAGE)  # before anything looks at each of its letters
    message = _LONG_WORD.sub(lambda word: cut(word[0], _LONGEST_WORD), printable(message))
    return cut(message, _LONGEST_MESSAGE)


def shortened(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, for a message."""
    names = list(names)
    return ", ".join(printable(name, keep="") for name in names[:limit]) + (", ..." if len(names) > limit else "")


def reason_of(error: BaseException, limit: int = 200) -> str:
    """What an error says, on one line and without its middle, if it is long."""
    return cut(" ".join(str(error).split()), limit)


def type_name(value: object) -> str:
    """What a value is, for a message: `dict`, or `the class Net`."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class ReconError(Exception):
    """Base of every error that recon raises on purpose; its message is of bounded length, and safe for a terminal."""

    def __init__(self, message: str = "") -> None:
        super().__init__(readable(message))


class UsageError(ReconError):
    """What the caller passed in cannot work: a wrong name, file, number or model."""


class UnknownNameError(UsageError):
    """A problem, task, layer or method that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(name[:_LONGEST_WORD], known[:_MOST_COMPARED], n=3, cutoff=0.5)
        tail = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {shortened(known, 12) or 'none'}."
        super().__init__(f"There is no {kind} named {name!r}. {tail}{' ' + hint if hint else ''}")
        self.name = name
        self.near = near


class ProblemError(UsageError):
    """A problem that contradicts itself: its model, losses, tasks and batches do not fit together."""


class PlanError(UsageError):
    """A branch plan that does not fit its tasks or its model."""


class MapFileError(UsageError):
    """A conflict map file that cannot be read; the message names the file and the field."""


class MapMismatchError(UsageError):
    """A conflict map that was made for another architecture or other tasks."""


class CheckpointError(UsageError):
    """A saved model that is missing, damaged, or belongs to another plan or architecture."""


class FanError(UsageError):
    """A statement of the user's forward that cannot work on values which differ between tasks."""


class VerificationError(ReconError):
    """A branched model that does not compute what the original with each task's copies computes."""


class WriteError(ReconError):
    """A file that could not be written although its path is right: the disk is full, or failed."""


class GradientError(ReconError):
    """A gradient that cannot be used: absent for a whole task, or not finite."""


class NonFiniteError(GradientError):
    """A task's gradient that is infinite or NaN."""


class LoaderError(ReconError):
    """A data loader that raised an error during training."""
