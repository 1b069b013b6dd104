"""Loaders that draw their batches from other loaders. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from recon.errors import UsageError, shortened


class LoaderOfLoaders(ABC):
    """A loader that draws its batches from other loaders."""

    @abstractmethod
    def inner_loaders(self) -> Mapping[str, Iterable[Any]]:
        """Those loaders, by name."""

    @abstractmethod
    def once(self) -> Iterator[Any]:
        """The batches in which each one of the inner loaders is there once: for evaluation."""


def refuse_dict(loader: object) -> None:
    """Refuse a dict of loaders, whose keys would be taken for batches."""
    if isinstance(loader, Mapping):
        raise UsageError(
            f"The loader is a dict, of {shortened(map(repr, loader))}. To give each task a loader of its own, join "
            "them: recon.joint_loader({'task name': loader, ...})."
        )


def every_batch_once(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader's batches; each one of the loaders that it draws from once, however often it draws from them."""
    refuse_dict(loader)
    return loader.once() if isinstance(loader, LoaderOfLoaders) else loader


def all_inner_loaders(loader: object, path: str = "") -> dict[str, Iterable[Any]]:
    """The loaders that a loader draws from, and those that they draw from, by their path."""
    found: dict[str, Iterable[Any]] = {}
    if isinstance(loader, LoaderOfLoaders):
        for name, inner in loader.inner_loaders().items():
            inside = f"{path}.{name}" if path else name
            found |= {inside: inner, **all_inner_loaders(inner, inside)}
    return found
