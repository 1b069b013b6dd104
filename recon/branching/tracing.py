"""Prepare a branched model so that `torch.export` can trace it."""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from recon.branching.modules.branched import Branched, BranchedParameter
from recon.branching.modules.statistics import BranchedStatistics


class _FoundParameter(BranchedParameter):
    """A branched bare parameter that reads as a fan only while the model runs.

    torch finds a parameter by the attributes on its path, and a fan among these is not a module.
    """

    running = False

    def attribute(self, name: str) -> Any:
        """The fan, or this module."""
        return super().attribute(name) if self.running else self


def let_parameters_be_found(model: nn.Module) -> None:
    """Let torch find the copies of bare parameters by their names."""
    found = []
    for container in model.modules():
        for name, child in container._modules.items():
            if isinstance(child, BranchedParameter):
                container._parameters.pop(name, None)  # its empty place would be found first
                child.__class__ = _FoundParameter
                found.append(child)

    def set_running(running: bool) -> None:
        for parameter in found:
            parameter.__dict__["running"] = running

    model.register_forward_pre_hook(lambda *_: set_running(True), prepend=True)
    model.register_forward_hook(lambda *_: set_running(False))


def let_forward_be_read(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Make the forward a function that names every keyword.

    torch reads the forward's code, which a `PerTaskForward` object does not have; and programs of torch 2.15 fail if a
    batch arrives in `**kwargs`.
    """
    forward = model.forward

    def function(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    more = [name for name in kwargs if name not in signature.parameters]
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    model.forward = function
    for module in model.modules():
        if isinstance(module, (Branched, BranchedStatistics)):
            # While torch traces, its __getattr__ may return proxies of modules, of which there is no task view.
            module.__dict__["branches"] = module.branches


@contextmanager
def symbolic_len(model: nn.Module) -> Iterator[None]:
    """Let `len(x)` of a tensor be its first dimension, in the packages that the model's classes come from.

    Python turns the built-in's result into an integer, which fixes the batch size. (`torch.fx.wrap` replaces
    functions in the same way; replaced everywhere, it would end up in tables that torch makes on import.)
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    packages = {cls.__module__.partition(".")[0] for cls in classes}.difference(["torch"])
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in packages]
    namespaces = [vars(module) for module in modules if isinstance(module, ModuleType) and "len" not in vars(module)]
    for namespace in namespaces:
        namespace["len"] = _first_dimension
    try:
        yield
    finally:
        for namespace in namespaces:
            del namespace["len"]


def _first_dimension(x: Any, /) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else builtins.len(x)
