"""Nests of tuples, lists, dicts and dataclasses: torch's trees, into Python's own dataclasses too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map


def map_tree(call: Callable[..., Any], *structures: Any) -> Any:
    """`tree_map`, into dataclasses too: Python's own are leaves to it."""

    def visit(leaf: Any, *others: Any) -> Any:
        names = _parts(leaf)
        if names is None:
            return call(leaf, *others)
        values = [map_tree(call, *(getattr(part, name) for part in (leaf, *others))) for name in names]
        if isinstance(leaf, tuple):
            return type(leaf)._make(values)  # type: ignore[attr-defined]
        result = copy.copy(leaf)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(result, name, value)
        return result

    return tree_map(visit, *structures)


def leaves_of(structure: Any) -> Iterator[Any]:
    """`tree_leaves`, into dataclasses too."""
    for leaf in tree_leaves(structure):
        names = _parts(leaf)
        if names is None:
            yield leaf
        else:
            yield from leaves_of([getattr(leaf, name) for name in names])


def _parts(leaf: Any) -> Sequence[str] | None:
    """The names of what lies in a leaf of torch's trees that is none to us; None for any other."""
    if isinstance(leaf, type):
        return None
    if is_dataclass(leaf):
        return [field.name for field in fields(leaf)]
    # Older torch goes into named tuples, but not into classes made from them, such as PackedSequence.
    return getattr(leaf, "_fields", None) if isinstance(leaf, tuple) else None
