"""GradDrop: every coordinate of the update follows the tasks of one sign, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.aggregator import Aggregator
from recon.methods.bases.state import RandomStream
from recon.methods.registry import register

_IN_CACHE = 1 << 17  # columns of a block: the intermediate results stay in a CPU's cache
_ON_DEVICE = 1 << 23  # elsewhere, launching kernels is what costs time


@register(
    "graddrop",
    title="Gradient sign dropout",
    paper="Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov, NeurIPS 2020, arXiv 2010.06808, Algorithm 1",
    scale="The sum of the task gradients wherever their signs agree; elsewhere the sum of those of one sign.",
)
class GradDrop(Aggregator):
    """Keeps in each coordinate the gradients of one sign, with a chance that grows with their share of its size.

    The positive ones are kept with the probability `P = (1 + Σ g / Σ |g|) / 2`, the negative ones otherwise, for all
    tasks alike. The paper masks the gradients of a layer's activations; recon masks those of the shared parameters.

    Args:
        leak: how much of the dropped gradients gets through: 0 is the paper's default, 1 joint training.
        seed: of the method's own random stream, one uniform draw for each coordinate. The global random state is
            neither read nor changed, and the stream is part of the state_dict.

    Raises:
        UsageError: leak is not between 0 and 1.
    """

    scale_free = True
    memoryless = True

    def __init__(self, leak: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= leak <= 1:
            raise UsageError(f"GradDrop's leak must be a number from 0 to 1, but got {leak}.")
        self.leak = leak
        self.seed = seed
        self.stream = RandomStream(seed)

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The update for one step. See `Method.forward`."""
        return self.combine(J)[0]

    @torch.no_grad()
    def combine(self, J: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Aggregator.combine`."""
        self._check(J, tasks)
        self._positions(tasks, len(J))
        width = _IN_CACHE if J.device.type == "cpu" else _ON_DEVICE
        generator = self.stream.generator(J.device)
        update = J.new_empty(J.shape[1])
        for piece, block in zip(update.split(width), J.split(width, dim=1), strict=True):
            draws = torch.rand(len(piece), generator=generator, device=J.device, dtype=torch.float32)
            piece.copy_(follow_one_sign(block, draws, self.leak))
        return update, {}


def follow_one_sign(J: Tensor, draws: Tensor, leak: float = 0.0) -> Tensor:
    """Algorithm 1 from line 11 on, with the identity for its monotonic function: (P,), float32 at least.

    J is (T, P), one task gradient per row; the draws (P,) are uniform in [0, 1).
    """
    rows = J.float() if J.dtype in (torch.float16, torch.bfloat16) else J
    positive, negative = rows[0].clamp(min=0), rows[0].clamp(max=0)
    for row in rows[1:]:
        positive += row.clamp(min=0)
        negative += row.clamp(max=0)
    total = positive + negative if leak else None
    # draws < P, where P = positive / (positive - negative); nothing is divided by zero. 1 where the positive are kept:
    # torch.where takes as long on a CPU as all the rest.
    chosen = (positive - negative).mul_(draws)
    chosen = torch.sub(positive, chosen, out=chosen).sign_().clamp_(min=0)
    kept = negative.addcmul_(negative, chosen, value=-1).addcmul_(positive, chosen)
    return kept if total is None else torch.lerp(kept, total, leak)
