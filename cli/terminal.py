"""Print for terminals: no control characters from names or files, and nothing that the encoding lacks."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from recon.errors import ReconError, printable, readable

_IN_ASCII = {"×": "x", "Δ": "D", "±": "+-", "–": "-", "≥": ">=", "≤": "<=", "√": "sqrt ", "‖": "||"}
_UNENCODABLE = "recon.unencodable"


class StdoutError(ReconError):
    """Results that could not be printed, as on a full disk."""


def tell(text: str) -> None:
    """Write a message on stderr; results go to stdout."""
    with suppress(OSError):  # stderr is full or closed: nobody would read it
        print(readable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print results on stdout."""
    with _refused_by_stdout():
        print(printable(text), flush=True)


def flush() -> None:
    """Flush stdout."""
    with _refused_by_stdout():
        print(end="", flush=True)


@contextmanager
def _refused_by_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # The interpreter's own last flush must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # then its reader, such as `head`, has seen enough
            raise StdoutError(
                f"Cannot print the results: writing to standard output failed ({error.strerror}). Everything else was "
                "done."
            ) from error


@contextmanager
def for_terminals() -> Iterator[None]:
    """In this block, stdout and stderr show what their encoding can, and log messages are safe for a terminal."""
    codecs.register_error(_UNENCODABLE, _in_its_place)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    last_resort = logging.lastResort
    formatter = None if last_resort is None else last_resort.formatter
    try:
        for stream in streams:
            stream.reconfigure(errors=_UNENCODABLE)
        if last_resort is not None:
            last_resort.setFormatter(SafeFormatter())
        yield
    finally:
        if last_resort is not None:
            last_resort.setFormatter(formatter)
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


class SafeFormatter(logging.Formatter):
    """Log messages, of bounded length and safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return readable(super().format(record))


def log_handler(stream: TextIO) -> logging.Handler:
    """A handler that writes such messages."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter())
    return handler


def _in_its_place(error: UnicodeError) -> tuple[str, int]:
    """Replace letters that an encoding lacks: by ASCII signs, otherwise by their numbers."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(letter) or _escaped(letter) for letter in letters), error.end


def _escaped(letter: str) -> str:  # and no similar letter: a file's name must not read as another's
    return letter.encode("unicode_escape").decode("ascii")
