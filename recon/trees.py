"""Nests of tuples, lists, dicts and dataclasses: torch's trees, into Python's own dataclasses too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map


def map_tree(call: Callable[..., Any], *structures: Any) -> Any:
    """`tree_map`, into dataclasses too: Python's own are leaves to it."""

    def visit(leaf: Any, *others: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return call(leaf, *others)
        result = copy.copy(leaf)
        for field in fields(leaf):
            value = map_tree(call, *(getattr(part, field.name) for part in (leaf, *others)))
            object.__setattr__(result, field.name, value)
        return result

    return tree_map(visit, *structures)


def leaves_of(structure: Any) -> Iterator[Any]:
    """`tree_leaves`, into dataclasses too."""
    for leaf in tree_leaves(structure):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            yield leaf
