"""Hooks that stay for a block of code."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from torch.utils.hooks import RemovableHandle


def hooked(handles: Iterable[RemovableHandle]) -> ExitStack:
    """A block at whose end these hooks are removed."""
    block = ExitStack()
    for handle in handles:
        block.enter_context(handle)
    return block
