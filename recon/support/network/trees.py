"""Map over nests of tuples, lists, dicts and dataclasses, and list their leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map


def map_tree(call: Callable[..., Any], *structures: Any) -> Any:
    """`tree_map`, but into dataclasses too, which it treats as leaves."""

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
    """`tree_leaves`, but into dataclasses too."""
    for leaf in tree_leaves(structure):
        names = _parts(leaf)
        if names is None:
            yield leaf
        else:
            yield from leaves_of([getattr(leaf, name) for name in names])


def _parts(leaf: Any) -> Sequence[str] | None:
    """The names of the fields of what is a leaf to torch, but not to recon; None for a leaf to both."""
    if isinstance(leaf, type):
        return None
    if is_dataclass(leaf):
        return [field.name for field in fields(leaf)]
    # Older torch maps over named tuples, but not over classes derived from them, such as PackedSequence.
    return getattr(leaf, "_fields", None) if isinstance(leaf, tuple) else None
