"""Renaming a conflict map's layers, and saying what to try when its names fit nothing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile

from recon.errors import MapMismatchError, UnknownNameError, UsageError
from recon.maps.score_table import Table

_CANDIDATES = 20  # try at most so many prefixes (the most frequent first) or names: comparing all takes seconds


def renamed(cmap: Table, rename: Mapping[str, str] | None) -> Table:
    """The same map with other layer names, by `{old prefix: new prefix}` of whole path components.

    An empty old prefix puts the new one before every name, an empty new one removes the old one. Where several fit,
    the longest one counts, once.
    """
    if not rename:
        return cmap
    rename = {old.strip("."): new.strip(".") for old, new in rename.items()}
    names = [layer.name for layer in cmap.layers]
    used = {name: _prefix_of(name, rename) for name in names}
    for old in rename:
        if old not in used.values():
            raise UnknownNameError("layer or prefix in the map", old, _prefixes(names), "Renames must change a name.")
    new_names = {name: _renamed(name, rename) for name in names}
    for name, new in new_names.items():
        if not new:
            raise UsageError(f"The rename {name!r}='' leaves nothing of the layer's name. Give it a new one.")
    twice = [new for new, count in Counter(new_names.values()).items() if count > 1]
    if twice:
        old_names = [name for name in names if new_names[name] == twice[0]]
        raise MapMismatchError(
            f"The renames make one layer, {twice[0]!r}, of the map's layers {' and '.join(map(repr, old_names))}. "
            "Rename them to different names."
        )
    layers = [
        replace(layer, name=new_names[layer.name], members=tuple(_renamed(name, rename) for name in layer.members))
        for layer in cmap.layers
    ]
    return replace(cmap, layers=layers)


def rename_hint(names: Sequence[str], known: Sequence[str]) -> str:
    """What to try when few or none of a map's layer names are known: a rename, or else the nearest names."""
    found = _suggested_rename(names, known)
    if found:
        old, new = found
        return f"Try renaming them: rename={{{old!r}: {new!r}}}, on the command line --rename '{old}={new}'."
    unknown = [name for name in names if name not in set(known)][:_CANDIDATES]
    pairs = ((name, difflib.get_close_matches(name, known, n=1)) for name in unknown)
    near = list(islice((f"{name!r} is like {found[0]!r}" for name, found in pairs if found), 3))
    return f"Nearest names: {', '.join(near)}." if near else ""


def _suggested_rename(names: Sequence[str], known: Sequence[str]) -> tuple[str, str] | None:
    """The change of prefix after which most of the names are known, if that is at least half of them."""
    ends: dict[str, list[list[str]]] = {}
    for name in known:
        ends.setdefault(name.rpartition(".")[2], []).append(name.split("."))
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in names:
        parts = name.split(".")
        prefixes.update(_differing_prefixes(parts, other) for other in ends.get(parts[-1], []))
    now = len(set(names) & set(known))
    best, most = None, max(now, (len(names) - 1) // 2)
    for (old, new), _ in prefixes.most_common(_CANDIDATES):
        after = {_replace(name, old, new) if _begins(name, old) else name for name in names}
        if len(after & set(known)) > most:
            best, most = (old, new), len(after & set(known))
    return best


def _differing_prefixes(one: list[str], other: list[str]) -> tuple[str, str]:
    """Two paths without the components that both end with."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))
    return ".".join(one[: len(one) - same]), ".".join(other[: len(other) - same])


def _prefix_of(name: str, rename: Mapping[str, str]) -> str | None:
    return max((old for old in rename if _begins(name, old)), key=len, default=None)


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    old = _prefix_of(name, rename)
    return name if old is None else _replace(name, old, rename[old])


def _begins(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _replace(name: str, old: str, new: str) -> str:
    rest = name[len(old) :].lstrip(".")
    return ".".join(part for part in (new, rest) if part)


def _prefixes(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(path[:length]) for path in parts for length in range(1, len(path) + 1)))
