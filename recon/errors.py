"""Named exceptions: what was wrong, what was expected, what to try next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first of these names, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


class ReconError(Exception):
    """Base of every error that recon raises on purpose."""


class UsageError(ReconError):
    """What the caller passed in cannot work: a wrong name, file, number or model."""


class UnknownNameError(UsageError):
    """A problem, task, layer or method that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        tail = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {some(known, 12) or 'none'}."
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


class GradientError(ReconError):
    """A gradient that cannot be used: absent for a whole task, or not finite."""


class LoaderError(ReconError):
    """A data loader that raised in the middle of a training."""
