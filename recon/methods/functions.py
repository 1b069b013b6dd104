"""Methods from a plain function of the gradients, of their Gramian, or of the losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.methods.bases.aggregator import Aggregator, GramianAggregator
from recon.methods.bases.loss_weights import LossWeights
from recon.methods.bases.method import Method, check_rows


class _OfFunction(Method):
    """What a class made by `method_class` adds to its family's."""

    memoryless = True
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        defaults = {o: parameter.default for o, parameter in inspect.signature(type(self)).parameters.items()}
        self.options = defaults | options

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return self.options

    def _call(self, argument: Tensor, length: int) -> Tensor:
        result = type(self).function(argument, **self.options)
        if not isinstance(result, Tensor) or result.shape != (length,):
            got = f"one of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise UsageError(
                f"Method {self.name!r} was called with a tensor of shape {tuple(argument.shape)} and must return a "
                f"tensor of shape ({length},), but returned {got}."
            )
        if result.device.type == "cpu" and not result.isfinite().all():  # elsewhere, asking would wait for it
            raise UsageError(
                f"Method {self.name!r} returned numbers that are not finite, for a finite tensor of shape "
                f"{tuple(argument.shape)}. Look for a division by zero, or a logarithm or root of too small a number."
            )
        return result.detach().to(argument)


class _Gradients(_OfFunction, Aggregator):
    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """See `Method.forward`."""
        check_rows(J)
        return self._call(J, J.shape[1])


class _Gramian(_OfFunction, GramianAggregator):
    @torch.no_grad()
    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        return self._call(self._finite(gramian, tasks), len(gramian)).to(gramian)


class _Losses(_OfFunction, LossWeights):
    @torch.no_grad()
    def _weigh(self, losses: Tensor, positions: Sequence[int]) -> Tensor:
        return self._call(losses, len(losses))


_FAMILIES: dict[str, type[_OfFunction]] = {"J": _Gradients, "gramian": _Gramian, "losses": _Losses}


def method_class(function: Callable[..., Tensor]) -> type[Method]:
    """A method that calls a function in every step. What the function's first parameter is called says what it gets.

    `J`: (T, P), one task gradient per row, for an aggregator; the function returns the update, (P,).
    `gramian`: (T, T), their inner products, in float64 on the CPU, for an aggregator; it returns the (T,) weights of
    the gradients, and costs less than one of J.
    `losses`: (T,), for a weighting; it returns the (T,) weights of the losses.

    T counts the tasks that are there in the step. Further parameters, each with a default, are the method's options.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    first = parameters[0].name if parameters else ""
    if first not in _FAMILIES:
        raise UsageError(
            "A method's function needs J (the task gradients), gramian (their inner products) or losses as its "
            f"first parameter, by this name, but {function.__name__}{signature} has none of them."
        )
    content = {
        "function": staticmethod(function),
        "name": function.__name__,
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__signature__": signature.replace(parameters=parameters[1:]),
    }
    return type(function.__name__, (_FAMILIES[first],), content)
