"""Read JSON documents that others may have written: of limited size, complete, and with every field checked.

A document is refused if it is too large, not UTF-8, not complete JSON, nested deeper than any of recon's, or if it
holds a key twice, NaN, an infinity, or half of a surrogate pair; the message names the file and the field. The reader
of each kind of document says what its fields must be, by the methods of `Document`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recon.errors import UsageError, cut, printable

MOST_BYTES = 64 * 2**20
"""The largest document that is read: a conflict map of 1,000 layers and 40 tasks takes 40 MB."""

MOST_LINES = 2**30
"""The largest file with one document on each line that is read: a training step of 40 tasks takes 2 KB."""

_DEPTH = 24
_MOST = 2**63 - 1  # what numpy and torch can count
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_values(value: Any) -> Any:
    """The same nest of dicts and lists with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A value for a message: its repr, escaped and cut."""
    return cut(printable(repr(value), keep=""), 100)


def read_document(path: str | Path, error: type[UsageError], remedy: str, most: int = MOST_BYTES) -> Document:
    """The JSON object in a file of at most `most` bytes.

    Where there is none, `error` is raised; every message ends with `remedy`, a sentence that says what to try.
    """
    return parse_document(_read(path, error, remedy, most), str(path), error, remedy)


def read_documents(path: str | Path, error: type[UsageError], remedy: str) -> list[Document]:
    """The JSON objects in a file, one on each line; messages name the line. See `read_document`."""
    text = _read(path, error, remedy, MOST_LINES)
    return [
        parse_document(line, f"{path}, line {number}", error, remedy)
        for number, line in enumerate(text.split("\n"), start=1)
        if line
    ]


def parse_document(text: str, source: str, error: type[UsageError], remedy: str) -> Document:
    """The JSON object in a text; `source` names it in messages. See `read_document`."""
    try:
        values = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number, parse_float=_finite)
        _check_depth(values)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except (_RefusedError, RecursionError) as reason:
        what = "is nested too deeply" if isinstance(reason, RecursionError) else str(reason)
        raise error(f"{source}: {what}. {remedy}") from None
    except UnicodeEncodeError as reason:
        raise error(f"{source}: holds half of a character (a lone surrogate). {remedy}") from reason
    except ValueError as reason:
        raise error(f"{source}: not whole JSON ({reason}); the file may be truncated. {remedy}") from reason
    if not isinstance(values, dict):
        raise error(f"{source}: holds a {type(values).__name__}, not one JSON object. {remedy}")
    return Document(values, source, error, remedy)


class Document:
    """A JSON object, with typed access to its fields; errors name the file and the field.

    `where` is the path of this object in the file, as in `layers[3].`; empty for the whole.
    """

    def __init__(self, values: Any, source: str, error: type[UsageError], remedy: str, where: str = "") -> None:
        self.values, self.source, self.error, self.remedy, self.where = values, source, error, remedy, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def fail(self, what: str) -> NoReturn:
        """Refuse the file."""
        raise self.error(f"{self.source}: {what}. {self.remedy}")

    def wrong(self, key: str, what: str) -> NoReturn:
        """Refuse a field: "field 'seed' is -1, not a number of at least 0"."""
        self.fail(f"field {self.name(key)} {what}")

    def name(self, key: str) -> str:
        """A field's name for a message."""
        return shown(f"{self.where}{key}")

    def check_format(self, name: str, version: int, hint: str = "", older: Sequence[int] = ()) -> int:
        """The version, which is this or one of the older ones; `hint` is added to the message about another format."""
        found = self.get("format", str)
        if found != name:
            self.wrong("format", f"is {shown(found)}, not {name!r}{hint}")
        found_version = self.integer("version", least=None)
        if found_version not in (*older, version):
            known = " and ".join(map(str, (*older, version)))
            self.wrong("version", f"is {found_version}, but this recon reads version {known}")
        return found_version

    def get(self, key: str, *kinds: type) -> Any:
        """A field of one of these types; True and False are not numbers."""
        if key not in self.values:
            self.wrong(key, "is missing")
        value = self.values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.wrong(key, f"has the wrong type ({type(value).__name__})")
        return value

    def text(self, key: str, *, empty: bool = True) -> str:
        """A text."""
        value: str = self.get(key, str)
        if not value and not empty:
            self.wrong(key, "is empty")
        return value

    def flag(self, key: str) -> bool:
        """True or False."""
        return bool(self.get(key, bool))

    def integer(self, key: str, *, least: int | None = 0, most: int = _MOST) -> int:
        """A whole number from `least` to `most`."""
        value: int = self.get(key, int)
        if value > most or value < (-most if least is None else least):
            self.wrong(key, f"is {shown(value)}, not a whole number {_range(least, most)}")
        return value

    def number(self, key: str, *, least: float | None = None) -> float:
        """A number; a whole one stays an int."""
        value: float = self.get(key, int, float)
        if (isinstance(value, int) and abs(value) > _MOST) or (least is not None and value < least):
            self.wrong(key, f"is {shown(value)}, not a number {_range(least, _MOST)}")
        return value

    def number_or_nan(self, key: str, *, least: float | None = None) -> float:
        """A number; null, which means one that is not finite, gives NaN."""
        return math.nan if key in self.values and self.values[key] is None else self.number(key, least=least)

    def names(self, key: str, *, least: int = 0) -> tuple[str, ...]:
        """A list of different names, none of them empty."""
        value: list[Any] = self.get(key, list)
        if not all(isinstance(entry, str) and entry for entry in value):
            self.wrong(key, "is not a list of names")
        if len(set(value)) < len(value):
            self.wrong(key, f"names {shown(_twice(value))} twice")
        if len(value) < least:
            self.wrong(key, f"is {shown(value)}, not a list of {least} or more different names")
        return tuple(value)

    def counts(self, key: str) -> list[int]:
        """A list of whole numbers of at least 0."""
        value: list[Any] = self.get(key, list)
        if not all(type(entry) is int and 0 <= entry <= _MOST for entry in value):
            self.wrong(key, "is not a list of counts")
        return value

    def table(self, key: str) -> Document:
        """An object within this one."""
        return self._within(self.get(key, dict), f"{self.where}{key}.")

    def tables(self, key: str) -> Iterator[Document]:
        """The objects of a list within this one."""
        for number, value in enumerate(self.get(key, list)):
            if not isinstance(value, dict):
                self.wrong(f"{key}[{number}]", f"has the wrong type ({type(value).__name__})")
            yield self._within(value, f"{self.where}{key}[{number}].")

    def _within(self, values: Any, where: str) -> Document:
        return Document(values, self.source, self.error, self.remedy, where)


def _read(path: str | Path, error: type[UsageError], remedy: str, most: int) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file. {remedy}") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}). {remedy}") from reason
    if len(content) > most:
        raise error(f"{path}: is larger than {most >> 20} MiB, and is not read. {remedy}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not whole JSON (byte {reason.start} is no UTF-8). {remedy}") from reason


class _RefusedError(ValueError):
    """JSON that recon does not read."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _RefusedError(f"holds the key {shown(_twice([key for key, _ in pairs]))} twice in one object")
    return table


def _twice(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _no_number(constant: str) -> NoReturn:
    raise _RefusedError(f"holds {constant}, which is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"holds the number {shown(digits)}, which is too large")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEPTH):
        entries = (entry.values() if isinstance(entry, dict) else entry for entry in level)
        level = [inner for outer in entries for inner in outer if isinstance(inner, (dict, list))]
        if not level:
            return
    raise RecursionError


def _range(least: float | None, most: float) -> str:
    bound = f" and at most {most}" if most != _MOST else ""
    return f"of at least {least}{bound}" if least is not None else "that can be counted with"
