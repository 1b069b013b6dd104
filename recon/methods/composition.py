"""Composition: a loss weighting feeding a gradient aggregator, as in `uw+pcgrad`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import UsageError
from recon.methods.bases.aggregator import Aggregator, GramianAggregator
from recon.methods.bases.method import Method
from recon.methods.bases.weighting import Weighting


class Composition(Aggregator):
    """Multiplies the task gradients by a loss weighting's weights, then combines them with an aggregator.

    What one task alone reaches gets the task's weight. A weighting that learns (uw) gets its own gradients.

    Args:
        weighting: sets the weights.
        aggregator: combines the weighted gradients.

    Raises:
        UsageError: they are not one weighting and one aggregator, in this order.
    """

    def __init__(self, weighting: Weighting, aggregator: Aggregator) -> None:
        super().__init__()
        _check((weighting, aggregator))
        self.weighting = weighting
        self.aggregator = aggregator
        self.name = f"{weighting.name}+{aggregator.name}"
        self.scale_free = weighting.scale_free and aggregator.scale_free
        self.memoryless = weighting.memoryless and aggregator.memoryless
        self.needs_new_losses = weighting.needs_new_losses or aggregator.needs_new_losses

    @property
    def parts(self) -> tuple[Weighting, Aggregator]:
        """The weighting and the aggregator."""
        return self.weighting, self.aggregator

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {f"{part.name}:{option}": value for part in self.parts for option, value in part.settings().items()}

    def _create_state(self) -> None:
        for part in self.parts:
            part.setup(self.tasks)

    def attach(self, model: nn.Module) -> None:
        """See `Method.attach`."""
        for part in self.parts:
            part.attach(model)

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """See `Method.after_step`."""
        for part in self.parts:
            if part.needs_new_losses:
                part.after_step(losses)

    def end_epoch(self) -> None:
        """See `Method.end_epoch`."""
        for part in self.parts:
            part.end_epoch()

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The aggregator's update for the present weights. See `Method.forward`."""
        return self.aggregator(self.weighting.row_weights(J)[:, None] * J)

    def gramian_weights(self, gramian: Tensor, scale: Tensor, tasks: Sequence[str]) -> Tensor:
        """What to multiply each task gradient with, both methods' weights in one.

        Args:
            gramian: (T, T), of the gradients without weights.
            scale: (T,), the weighting's.
            tasks: the rows' task names.

        Returns:
            (T,), on the Gramian's device and in its dtype.
        """
        assert isinstance(self.aggregator, GramianAggregator)
        scale = scale.to(gramian)
        return scale * self.aggregator.weights(scale[:, None] * gramian * scale, tasks=tasks)


def compose(parts: Sequence[Method]) -> Composition:
    """The composition of a weighting and an aggregator; nothing else can be composed."""
    _check(parts)
    weighting, aggregator = parts
    assert isinstance(weighting, Weighting) and isinstance(aggregator, Aggregator)
    return Composition(weighting, aggregator)


def _check(parts: Sequence[Method]) -> None:
    families = [_family(part) for part in parts]
    if families != ["weighting", "aggregator"] or isinstance(parts[1], Composition):
        got = ", ".join(f"{part.name!r} ({family})" for part, family in zip(parts, families, strict=True))
        raise UsageError(f"A composition is a weighting and then an aggregator, as in 'uw+pcgrad', but got {got}.")


def _family(part: Method) -> str:
    kinds = {Weighting: "weighting", Aggregator: "aggregator"}
    return next((name for kind, name in kinds.items() if isinstance(part, kind)), "neither")
