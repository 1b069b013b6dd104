"""ExcessMTL: the more a task could still gain, the more it weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.state import RemembersTasks
from recon.methods.registry import register

_IN_CACHE = 1 << 15  # columns of a block: the intermediate results stay in a CPU's cache
_ON_DEVICE = 1 << 23  # elsewhere, launching kernels is what costs time


@register(
    "excessmtl",
    title="Excess risks",
    paper="He, Zhou, Zhang, Zhao, ICML 2024, arXiv 2402.02009, Algorithm 1, eqs. (6), (7), (9)",
    scale="The weights add up to T (the paper's to 1).",
)
class ExcessMTL(RemembersTasks):
    """Weighs a task the more, the more of its first excess risk is left.

    A task's excess risk, how far its loss is above the least it can be, is estimated as `Σ g² / √S`, where S is the sum
    of its squared gradients so far: the diagonal of Adagrad's metric. It is counted in units of its average over the
    first steps, and multiplies the task's weight by its exponential, `w ← w exp(lr E)`; where tasks are
    absent, the others share what they have together. Keeps one number for every task and shared parameter. A step with
    one task alone changes nothing.

    Args:
        lr: of the weights; 0.01 and less are usual.
        warmup: steps of a task whose average is the unit; until all tasks of a step have had theirs, the weights stay.
            Steps in which the task's gradient is zero do not count.
            The paper takes the steps of three epochs.

    Raises:
        UsageError: lr is not positive, or warmup is below 1; the number of shared parameters changes between steps, or
            the gradients of some are sparse.
    """

    keeps_columns = True

    def __init__(self, lr: float = 0.01, warmup: int = 1) -> None:
        super().__init__()
        if not 0 < lr < math.inf:
            raise UsageError(f"ExcessMTL's lr must be positive and finite, but got {lr}.")
        if warmup < 1:
            raise UsageError(f"ExcessMTL's warmup must be at least 1 step, but got {warmup}.")
        self.lr = lr
        self.warmup = warmup

    def _create_state(self) -> None:
        count = len(self.tasks)
        self.memory["log_shares"] = torch.full((count,), -math.log(count), dtype=torch.float64)
        self.memory["first_risks"] = torch.zeros(count, dtype=torch.float64)
        self.memory["steps"] = torch.zeros(count, dtype=torch.int64)

    def forward(self, J: Tensor) -> Tensor:
        """The update for one step. See `Method.forward`."""
        return self.combine(J)[0]

    @torch.no_grad()
    def combine(self, J: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Aggregator.combine`."""
        self._check(J, tasks)
        positions = self._positions(tasks, len(J))
        if len(J) == 1:  # A task alone shares no parameters, and there is no other to compare it with.
            return J[0].clone(), {self.tasks[positions[0]]: J.new_ones(())}
        shares = self._follow(self._excess_risks(J, positions), positions)
        weights = (len(J) * shares).to(J)
        return weights @ J, {self.tasks[position]: weight for position, weight in zip(positions, weights, strict=True)}

    def _excess_risks(self, J: Tensor, positions: Sequence[int]) -> Tensor:
        """(T,) of this step's tasks."""
        roots = self._roots(J)
        width = _IN_CACHE if J.device.type == "cpu" else _ON_DEVICE
        risks = torch.zeros(len(J), dtype=torch.float64)
        for i, position in enumerate(positions):
            pieces = [
                _excess_risk(g, root) for g, root in zip(J[i].split(width), roots[position].split(width), strict=True)
            ]
            risks[i] = torch.stack(pieces).double().sum() if pieces else 0
        return risks

    def _roots(self, J: Tensor) -> Tensor:
        """(all tasks, P), √S: the squares themselves would leave float32."""
        shape = len(self.tasks), J.shape[1]
        roots = self.memory.get("roots")
        if roots is None:
            roots = torch.zeros(shape, dtype=torch.promote_types(J.dtype, torch.float32), device=J.device)
        if roots.shape != shape:
            raise UsageError(
                f"ExcessMTL keeps a sum for every shared parameter: it had {roots.shape[1]} gradients of each task so "
                f"far, but now got {shape[1]}. The tasks must share the same parameters in every step."
            )
        self.memory["roots"] = roots.to(J.device)
        return self.memory["roots"]

    def _follow(self, risks: Tensor, positions: Sequence[int]) -> Tensor:
        """The tasks' shares after this step, which add up to 1."""
        first, steps, log_shares = (self.memory[name] for name in ("first_risks", "steps", "log_shares"))
        warming = steps[positions] < self.warmup
        steps[positions] += (risks > 0).to(steps)  # a gradient of zero does not show which risks are usual
        first[positions] += torch.where(warming, risks / self.warmup, 0.0)
        known = first[positions] > 0
        excess = torch.where(known & ~warming, risks / torch.where(known, first[positions], 1.0), 0.0)
        together = log_shares[positions].logsumexp(dim=0)
        moved = torch.log_softmax(log_shares[positions] + self.lr * excess, dim=0)
        if not warming.any():
            log_shares[positions] = together + moved
        return torch.softmax(log_shares[positions], dim=0)


def _excess_risk(g: Tensor, root: Tensor) -> Tensor:
    """`Σ g² / √(S + g²)`, where `root` is √S, and becomes √(S + g²)."""
    g = g.to(root.dtype)
    torch.hypot(root, g, out=root)
    ratio = g / root.clamp(min=torch.finfo(root.dtype).tiny)
    return torch.dot(ratio, g)
