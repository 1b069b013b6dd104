"""Task gradients of the kinds that gradient methods meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def gradients(kind: str, tasks: int, seed: int = 0) -> Tensor:
    """(tasks, P) float64 task gradients of one kind."""
    g = torch.Generator().manual_seed(1000 * tasks + seed)
    J = torch.randn(tasks, 60, generator=g, dtype=torch.float64)
    if kind == "unequal":
        J *= torch.logspace(0, -6, tasks, dtype=torch.float64)[:, None]
    elif kind in ("conflicting", "cancelling"):
        left = 0.1 if kind == "conflicting" else 1e-3
        J += left * torch.randn(60, generator=g, dtype=torch.float64) - J.mean(dim=0)
    elif kind == "dependent":
        J = J[:, : max(tasks // 2, 1)]
    elif kind == "agreeing":
        J = J + 5 * torch.randn(60, generator=g, dtype=torch.float64)
    return J


KINDS = ["random", "unequal", "conflicting", "dependent", "agreeing"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_hard_kind = pytest.mark.parametrize("kind", [*KINDS, "cancelling"])
every_count = pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
