"""wrap(): any aggregator, weighting or scalarizer of TorchJD as one of recon's methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchjd import aggregation, scalarization
from torchjd.linalg import PSDMatrix

from recon.errors import UsageError
from recon.methods.bases.aggregator import Aggregator, GramianAggregator
from recon.methods.bases.method import Method
from recon.methods.bases.state import RandomStream
from recon.methods.bases.weighting import Weighting

_HOME = "_recon_method"
_PLAIN = (bool, int, float, str, Tensor, torch.dtype, torch.device, type(None))
# Their type says that they take any matrix, but they are for T×T products of gradients.
_ON_PRODUCTS = (aggregation.SDMGradWeighting, aggregation.MoDoWeighting)


def wrap(method: Any) -> Method:
    """A `Method` as it is, and a TorchJD object as a method: the same one whenever it is asked for the same object.

    The object does what it does in TorchJD, its scale included: many are in mean scale, T times shorter than recon's
    own methods, so they need a learning rate T times as high. Some need dependencies that recon does not. Beyond that:
    gradients that are not finite are refused by name; random numbers come from a stream of the object's own, so that
    the ranks of a distributed training agree; and its state is part of the `state_dict`, as far as it is made of
    parameters, tensors and plain values, which the Adam inside TorchJD's FAMO is not. An object that keeps a state by
    row knows nothing of tasks: where one is absent, it starts over or raises, as its documentation says.

    Args:
        method: a `Method`, or a TorchJD `Aggregator`, `Weighting` (on Gramians or Jacobians) or `Scalarizer`.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(method, Method):
        return method
    kind = _kind(method)
    if kind is None and inspect.isfunction(method):
        raise UsageError(
            f"method is the function {method.__name__}. Register it with @recon.methods.register('a-name'), then pass "
            "recon.methods.get('a-name')."
        )
    if kind is None:
        raise UsageError(
            f"method is a {type(method).__name__}, not a method. Make it once, before the loop: "
            "method = recon.methods.get('pcgrad')."
        )
    if _HOME not in vars(method):
        # Past nn.Module, for which the object would be a part of itself.
        vars(method)[_HOME] = kind(method)
    wrapped: Method = vars(method)[_HOME]
    return wrapped


def _kind(thing: Any) -> type[_Wrapped] | None:
    if isinstance(thing, scalarization.Scalarizer):
        return WrappedScalarizer
    if isinstance(thing, aggregation.Weighting):
        return WrappedGramianWeighting if _takes_gramian(thing) else WrappedAggregator
    if isinstance(thing, aggregation.Aggregator):
        own_forward = type(thing).forward is not aggregation.GramianWeightedAggregator.forward
        is_weighted = isinstance(thing, aggregation.GramianWeightedAggregator) and not own_forward
        return WrappedGramianWeighting if is_weighted else WrappedAggregator
    return None


def _takes_gramian(weighting: nn.Module) -> bool:
    if isinstance(weighting, aggregation.CRMOGMWeighting):
        return _takes_gramian(weighting.weighting)
    bases = [base for cls in type(weighting).__mro__ for base in vars(cls).get("__orig_bases__", ())]
    return isinstance(weighting, _ON_PRODUCTS) or any(PSDMatrix in get_args(base) for base in bases)


class _Wrapped(Method):
    """What the kinds of wrapped objects have in common: a random stream, and a state that survives a file."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.name = type(wrapped).__name__
        self.wrapped = wrapped
        self.stream = RandomStream(0)
        self.register_load_state_dict_pre_hook(_make_room)

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks' names, and what the object keeps outside of parameters and buffers."""
        return {"tasks": list(self.tasks), "values": {path: _values(part) for path, part in self._parts()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Gives the object back what it kept."""
        for path, part in self._parts():
            vars(part).update(state["values"].get(path, {}))

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        return self.wrapped.named_modules()


def _values(part: nn.Module) -> dict[str, Any]:
    internals = vars(nn.Module())
    return {name: value for name, value in vars(part).items() if name not in internals and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)


def _make_room(method: Any, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """TorchJD makes its buffers in the first step: those of the file may not be there yet, nor be as large."""
    for path, part in method.wrapped.named_modules(prefix=f"{prefix}wrapped"):
        for name in part._buffers:
            saved = state.get(f"{path}.{name}")
            setattr(part, name, None if saved is None else torch.empty_like(saved))


class WrappedGramianWeighting(_Wrapped, GramianAggregator):
    """A TorchJD object that needs only the Gramian: it gets it on the CPU in float64, or as its own tensors are."""

    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """See `GramianAggregator.weights`."""
        G = self._finite(gramian, tasks)
        weighting = getattr(self.wrapped, "gramian_weighting", self.wrapped)
        with torch.no_grad(), self.stream.lent():
            weights: Tensor = weighting(G.to(_first_tensor(weighting, G)))
        return weights.to(gramian)


def _first_tensor(weighting: nn.Module, default: Tensor) -> Tensor:
    """A preference vector of the user's, say, which the Gramian must go with."""
    kept = [value for part in weighting.modules() for value in (*vars(part).values(), *part._buffers.values())]
    return next((value for value in kept if isinstance(value, Tensor) and value.is_floating_point()), default)


class WrappedAggregator(_Wrapped, Aggregator):
    """A TorchJD object that needs the gradients themselves."""

    def forward(self, J: Tensor) -> Tensor:
        """The update for one step. See `Method.forward`."""
        return self.combine(J)[0]

    @torch.no_grad()
    def combine(self, J: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Aggregator.combine`."""
        self._check(J, tasks)
        # Some of TorchJD's solvers have no half precision.
        rows = J.to(torch.promote_types(J.dtype, torch.float32))
        weighting = self.wrapped
        if isinstance(weighting, aggregation.WeightedAggregator):
            weighting = weighting.weighting
        with self.stream.lent(J.device):
            result: Tensor = weighting(rows)
        if not isinstance(weighting, aggregation.Weighting):
            return result.to(J), {}
        names = tasks or self.tasks or [str(i) for i in range(len(J))]
        return (result.to(rows) @ rows).to(J), dict(zip(names, result, strict=True))


class WrappedScalarizer(_Wrapped, Weighting):
    """A TorchJD scalarizer: a task's weight is the derivative of the scalar with respect to its loss."""

    wrapped: Any

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(wrapped)
        self.needs_new_losses = hasattr(wrapped, "update")  # FAMO
        self._latest = torch.empty(0)

    def _create_state(self) -> None:
        self._latest = torch.ones(len(self.tasks))

    @torch.enable_grad()
    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Weighting.combine`."""
        values = self._stack(losses)
        values = values if values.requires_grad else values.requires_grad_()
        with self.stream.lent(values.device):
            total: Tensor = self.wrapped(values)
        (weights,) = torch.autograd.grad(total, values, retain_graph=True)
        if self.tasks:
            self._latest[self._positions(losses)] = weights.to(self._latest)
        return total, dict(zip(losses, weights, strict=True))

    def weights(self, count: int) -> Tensor:
        """Those of the latest step, 1 before the first. See `Weighting.weights`."""
        return self._latest if self.tasks else torch.ones(count)

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """See `Method.after_step`."""
        self.wrapped.update(torch.stack(list(losses.values())))

    def end_epoch(self) -> None:
        """See `Method.end_epoch`."""
        if hasattr(self.wrapped, "step"):  # DWA
            self.wrapped.step()

    def get_extra_state(self) -> dict[str, Any]:
        """See `_Wrapped.get_extra_state`; and the latest weights."""
        return {**_Wrapped.get_extra_state(self), "latest": self._latest}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Gives the object back what it kept, if it is of the same tasks."""
        Weighting.set_extra_state(self, state)
        _Wrapped.set_extra_state(self, state)
        self._latest = state["latest"].clone()
