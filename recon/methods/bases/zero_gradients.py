"""Leave out tasks whose gradient is zero: it has no direction, and its weight no meaning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

NEGLIGIBLE = 1e-8
"""A gradient below this times the longest is as good as zero: a sum in float32 would not notice it."""


def has_direction(lengths: Tensor) -> Tensor:
    """(T,) booleans: which of these gradients, of such lengths, are long enough to have a direction."""
    return (lengths > 0) & (lengths > NEGLIGIBLE * lengths.max())


def with_meaning(weights: Mapping[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
    """The weights without those of tasks whose gradient is as good as zero: any weight would do the same.

    The lengths (T,) of the gradients are in the order of the weights.
    """
    if not weights:
        return {}
    kept = has_direction(lengths).tolist()
    return {task: weight for (task, weight), keep in zip(weights.items(), kept, strict=True) if keep}
