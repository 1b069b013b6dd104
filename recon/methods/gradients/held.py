"""Held losses: their gradients are there already and their graphs are freed, so that a step can go task by task.

The engine takes a held loss like any other one: wherever it would look at a loss's graph, it asks `held` first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recon.methods.gradients.sparse import add
from recon.support.network.tensors import as_real


@dataclass(eq=False)
class HeldGradients:
    """What the losses of one task have left: their gradients, and what their graphs showed before they were freed.

    Attributes:
        leaves: what the losses depend on.
        tables: the leaves of which they only look rows up, see `lookup_tables`.
        gradients: `{leaf: gradient}`; those of some leaves may be missing, which are zero.
        uses: when the forward used each leaf for the last time, see `last_uses`.
        at_once: the leaves that a compiled part of the model uses, see `used_at_once`.
        placed: the leaves whose gradients lie in the memory of a Jacobian, see `Workspace.lend`.
    """

    leaves: dict[Tensor, None] = field(default_factory=dict)
    tables: set[Tensor] = field(default_factory=set)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    uses: dict[Tensor, int] = field(default_factory=dict)
    at_once: set[Tensor] = field(default_factory=set)
    placed: set[Tensor] = field(default_factory=set)

    def add(self, other: HeldGradients) -> None:
        """Add those of another loss of the same task."""
        whole = (self.leaves.keys() - self.tables) | (other.leaves.keys() - other.tables)
        self.tables = (self.tables | other.tables) - whole
        self.leaves |= other.leaves
        for leaf, gradient in other.gradients.items():
            self.gradients[leaf] = add(self.gradients[leaf], gradient) if leaf in self.gradients else gradient
        self.uses |= other.uses
        self.at_once |= other.at_once

    def keep(self, leaf: Tensor, gradient: Tensor, place: Tensor | None) -> None:
        """Copy a gradient, to its place in a Jacobian if there is one."""
        if place is None or gradient.is_sparse:
            self.gradients[leaf] = gradient.clone()
        else:
            place.copy_(as_real(gradient))
            self.gradients[leaf] = torch.view_as_complex(place) if leaf.is_complex() else place
            self.placed.add(leaf)

    def take(self, leaf: Tensor) -> Tensor | None:
        """A gradient that is held no longer, for whoever wants to change it."""
        gradient = self.gradients.pop(leaf, None)
        return gradient if gradient is None or leaf not in self.placed else gradient.to(leaf.dtype, copy=True)

    def move_out(self) -> None:
        """Give the gradients that lie in a Jacobian memory of their own."""
        for leaf in self.placed & self.gradients.keys():
            self.gradients[leaf] = self.gradients[leaf].to(leaf.dtype, copy=True)
        self.placed.clear()

    def as_loss(self, value: Tensor) -> Tensor:
        """A held loss of this value, which depends on the leaves."""
        return _Held.apply(value, self, *self.leaves)


class _Held(torch.autograd.Function):
    """Stands where the graph was; nobody differentiates through it, since its gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, found: HeldGradients, *leaves: Tensor) -> Tensor:
        ctx.found = found
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("The gradients of a held loss are read, not computed again.")


def held(loss: Tensor) -> HeldGradients | None:
    """What a held loss holds; None for a loss that has its graph."""
    found = getattr(loss.grad_fn, "found", None)
    return found if isinstance(found, HeldGradients) else None
