"""Weightings that look at the norms of the task gradients in one layer: GradNorm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.task_adam import TaskAdam
from recon.methods.bases.task_values import TaskValues, read_values, values_by_task
from recon.methods.bases.weighting import Weighting
from recon.methods.registry import register

_LEAST = 1e-6  # what a weight is kept above


class NormWeighting(Weighting):
    """A loss weighting that gets, before every step's `combine`, the norm of each task's gradient in one layer.

    `recon.backward` measures the norms, see `recon.methods.gradients.norms`.

    Attributes:
        layer: the layer's name; the last one that all tasks share if empty.
    """

    layer: str = ""

    @abstractmethod
    def observe_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Takes note of the norms for the next `combine`.

        Args:
            norms: `{task: norm}` of the unweighted losses' gradients. Empty in a step with one task alone.
        """


@register(
    "gradnorm",
    title="Gradient normalization",
    paper="Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257, Algorithm 1",
    scale="The weights of all tasks add up to T; they start at 1.",
)
class GradNorm(NormWeighting):
    """Learns weights that bring the gradient norms of the weighted losses together, slow tasks' above the others.

    With `G_i = w_i ‖∇_W L_i‖` in the layer W and the relative inverse training rate r_i, which is `L_i / L_i(0)`
    divided by its mean over the tasks, the weights descend `Σ_i |G_i - mean(G) r_i^alpha|`, the target held constant;
    then they are renormalised to keep their sum. A step uses the weights from before it. Absent tasks keep their
    weights, and means are over the tasks that are there; a task alone learns nothing.

    The paper does not say what happens to a weight that a step moves below 0: here, it stays at a millionth.

    Args:
        alpha: how strongly tasks that learn slowly are pulled up. The paper uses 1.5 on NYUv2 and 0.12 on its toy.
        lr: of Adam on the weights.
        layer: where the norms are measured: a layer's name, or the last layer that all tasks share.
        initial: the losses L_i(0), in the order of the tasks or by name as in `"seg:log(13)/depth:1.2"`: log C for a
            cross-entropy over C classes, says the paper. Those not given, or 0, are measured: a task's first loss
            above 0.

    Raises:
        UsageError: alpha or an initial loss is negative, or lr not positive; from `setup`: there is not an initial loss
            for each task; from `combine`: a loss is negative, or no norms were given.
        UnknownNameError: from `setup`: an initial loss is for no task of the run.
    """

    initial: Tensor

    def __init__(
        self, alpha: float = 1.5, lr: float = 0.025, layer: str = "", initial: TaskValues | None = None
    ) -> None:
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise UsageError(f"GradNorm's alpha must be a finite number of at least 0, but got {alpha}.")
        if not 0 < lr < math.inf:
            raise UsageError(f"GradNorm's lr must be positive and finite, but got {lr}.")
        self.alpha = alpha
        self.lr = lr
        self.layer = layer
        self._given = {} if initial is None else read_values(initial, "initial losses")
        self._norms: Mapping[str, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return super().settings() | {"initial": self._given}

    def _create_state(self) -> None:
        self.learned = TaskAdam(torch.ones(len(self.tasks)), self.lr)
        given = values_by_task(self._given, self.tasks, "initial losses")
        self.register_buffer("initial", torch.tensor([given.get(task, 0.0) or math.nan for task in self.tasks]))

    def observe_norms(self, norms: Mapping[str, Tensor]) -> None:
        """See `NormWeighting.observe_norms`."""
        self._norms = norms

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighs the losses, and learns from them and the norms for the next step. See `Weighting.combine`."""
        positions = self._positions(losses)
        values = self._stack(losses)
        self._refuse(values.detach() < 0, positions, "compares how far losses of at least 0 have fallen")
        if self._norms is None:
            raise UsageError(
                f"Method {self.name!r} learns from gradient norms: call observe_norms before combine. recon.backward "
                "does."
            )
        weights = self.learned.value[positions].to(values)
        if len(losses) > 1:
            norms = torch.stack([self._norms[task] for task in losses])
            self._learn(values.detach().to(self.initial), norms.to(self.initial), positions)
        self._norms = None
        return (weights * values).sum(), dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """See `Weighting.weights`."""
        return self.learned.value if self.tasks else torch.ones(count)

    @torch.no_grad()
    def _learn(self, losses: Tensor, norms: Tensor, positions: list[int]) -> None:
        before = self.learned.value[positions]
        G = before * norms
        target = G.mean() * self._inverse_rates(losses, positions) ** self.alpha
        self.learned.step(torch.sign(G - target) * norms, positions)
        after = self.learned.value[positions].clamp(min=_LEAST)
        self.learned.value[positions] = after * before.sum() / after.sum()

    def _inverse_rates(self, losses: Tensor, positions: list[int]) -> Tensor:
        initial = self.initial[positions]
        initial = torch.where(initial.isnan() & (losses > 0) & losses.isfinite(), losses, initial)
        self.initial[positions] = initial
        ratios = torch.where(initial.isnan(), 1.0, losses / initial)
        mean = ratios.mean()
        return torch.where(mean > 0, ratios / mean, 1.0)
