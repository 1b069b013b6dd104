"""Methods as they are written on the command line."""

from __future__ import annotations

import re
from typing import Any

from recon.errors import UnknownNameError, UsageError
from recon.methods.bases.method import Method
from recon.methods.composition import compose
from recon.methods.registry import Known, MethodEntry, describe, find, make, names
from recon.support.importing import definitions_of, import_target

_JOINT = re.compile(r"\+(?=\s*(?:[^\W\d]|[./~\\]))")  # the plus of uw+pcgrad, not those of 1e+2 and normalize=loss+
# Options have a '=' where the name of a function has none; a Windows path has a colon of its own.
_OWN = re.compile(r"(?P<target>.+?\.py|[^:=]+):(?P<name>[^\W\d]\w*)(?::(?P<options>.*))?")


def parse(text: str) -> Method:
    """Makes a method from its form on the command line.

    Args:
        text: a name, with options as in `"cagrad:c=0.4,rescale=true"`; a weighting and an aggregator, as in
            `"dwa:temperature=1+cagrad:c=0.4"`; or a function or class of your own in either place, as in
            `"path/to/file.py:my_method"` or `"package.module:my_method:option=value"`.

    Raises:
        UnknownNameError: there is no such method, file, module, or function in it.
        UsageError: the text is malformed, or an option does not fit.
        ProblemError: the user's file raised an exception, which is chained.
    """
    first, *others = _JOINT.split(text)
    if others:
        return compose([_parse_one(part.strip()) for part in (first, *others)])
    return _parse_one(text.strip())


def _parse_one(text: str) -> Method:
    own = _OWN.fullmatch(text)
    if own is not None and own["target"] not in names():
        entry, cls = _own_method(own["target"], own["name"])
        tail = own["options"]
    else:
        name, colon, rest = text.partition(":")
        entry, cls = find(name.strip())
        tail = rest if colon else None
    return make(entry, cls, {} if tail is None else _options(tail, text, entry))


def _own_method(target: str, name: str) -> Known:
    module = import_target(target)
    if not hasattr(module, name):
        raise UnknownNameError("function or class", name, definitions_of(module), f"Looked in {target}.")
    return describe(getattr(module, name), name)


def _options(tail: str, text: str, entry: MethodEntry) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in tail.split(","):
        option, _, value = (part.strip() for part in item.partition("="))
        if not option.isidentifier() or not value or option in options:
            raise UsageError(
                f"Cannot read {item!r} in the method {text!r}. "
                "Expected 'name' or 'name:option=value,option=value', every option once."
            )
        # The name of a layer may be a number.
        options[option] = value if isinstance(entry.options.get(option), str) else _literal(value)
    return options


def _literal(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
