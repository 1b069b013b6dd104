"""FeatureMethod: a method that works inside the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from recon.methods.bases.method import Method


class FeatureMethod(Method):
    """A method that works on the gradients of features which the tasks share, inside the model: `attach` it first.

    It does the whole backward pass of a step itself, and goes only once through the layers before the features.
    """

    @abstractmethod
    def backward(
        self, losses: Mapping[str, Tensor], model: nn.Module, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Accumulate the update into the parameters' `.grad`.

        Args:
            losses: `{task: scalar loss}` of the latest forward pass; an absent task takes no part and keeps its state.
            model: what the method was attached to.
            loss_scale: what the losses' gradients, though not their values, were multiplied by; those that are
                accumulated stay so.

        Returns:
            `{task: weight}`: detached scalars, what the gradient of each task was multiplied by.

        Raises:
            NonFiniteError: a gradient is not finite.
            UsageError: the method is not attached, or the losses are not those of a forward pass since.
        """
