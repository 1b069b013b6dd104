"""Find a model's layers: what each owns, and every path at which it is reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from recon.errors import PlanError, UnknownNameError, UsageError, shortened

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Layer:
    """The smallest named module that owns parameters, or a bare parameter of a container; or several as one unit."""

    name: str  # the first path, if the module is reached by several
    kind: str  # the module's class name; `Parameter` for a bare parameter
    parameters: Mapping[str, nn.Parameter]  # by local name, those tied to an earlier layer left out
    aliases: tuple[str, ...] = ()  # other paths that reach the same module
    members: tuple[str, ...] = ()  # of a unit: the layers that it joins, see `layer_choice`

    @property
    def size(self) -> int:
        """The number of scalars in its parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each parameter."""
        return {name: list(p.shape) for name, p in self.parameters.items()}


@dataclass(frozen=True)
class Place:
    """One path at which a layer's module, or a bare parameter, is found. The same object may have several."""

    path: str
    parent: nn.Module
    attribute: str
    owner: nn.Module | nn.Parameter

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter found here, by local name, tied ones included."""
        if isinstance(self.owner, nn.Parameter):
            return {self.attribute: self.owner}
        return dict(self.owner.named_parameters())


@dataclass
class _Found:
    name: str
    kind: str
    parameters: dict[str, nn.Parameter]
    aliases: list[str] = field(default_factory=list)


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of `model`, in model order.

    A parameter shared by several modules belongs to the first that holds it.
    """
    by_owner: dict[int, _Found] = {}
    taken: set[int] = set()
    for place in places(model):
        known = by_owner.get(id(place.owner))
        if known is not None:
            known.aliases.append(place.path)
            continue
        own = {name: p for name, p in place.parameters.items() if id(p) not in taken}
        taken.update(map(id, own.values()))
        kind = "Parameter" if isinstance(place.owner, nn.Parameter) else type(place.owner).__name__
        by_owner[id(place.owner)] = _Found(place.path, kind, own)
    return [Layer(f.name, f.kind, f.parameters, tuple(f.aliases)) for f in by_owner.values() if f.parameters]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, which add prefixes to its names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            return model


def canonical_name(layers: list[Layer], name: str) -> str:
    """The layer's first path, for any path that reaches it; an error gives the nearest names."""
    for layer in layers:
        if name == layer.name or name in layer.aliases:
            return layer.name
    inside = [layer.name for layer in layers if layer.name.startswith(f"{name}.")]
    if inside:
        raise PlanError(
            f"{name!r} is not a layer, but holds {len(inside)}: {shortened(inside, 6)}. Name those that you want."
        )
    raise UnknownNameError("layer", name, [layer.name for layer in layers])


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; an error gives the nearest names."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownNameError("module", path, [name for name, _ in model.named_modules()]) from error


def places(model: nn.Module) -> Iterator[Place]:
    """Every path at which a layer is found, in model order; a module reached by two names comes twice."""
    return _walk(model, "")


def _walk(parent: nn.Module, prefix: str) -> Iterator[Place]:
    for name, parameter in parent._parameters.items():
        if parameter is not None:
            _refuse_lazy(parameter, prefix + name)
            yield Place(prefix + name, parent, name, parameter)
    for name, child in parent._modules.items():
        if child is None:
            continue
        if _is_layer(child):
            for inner, parameter in child.named_parameters():
                _refuse_lazy(parameter, f"{prefix}{name}.{inner}")
            yield Place(prefix + name, parent, name, child)
        else:
            yield from _walk(child, f"{prefix}{name}.")


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    own = {id(p) for p in module.parameters(recurse=False)}
    if not own:
        return is_parametrized(module)
    # nn.MultiheadAttention keeps a child (out_proj) whose parameters it reads itself: one layer.
    return _from_torch_nn(module) or all(id(p) in own for p in module.parameters())


def _from_torch_nn(module: nn.Module) -> bool:
    return any(c.__module__.startswith("torch.nn.") and c is not nn.Module for c in type(module).__mro__)


def _refuse_lazy(parameter: nn.Parameter, name: str) -> None:
    if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
        raise UsageError(
            f"Parameter {name!r} is not initialised yet (a lazy module). Run the model once on a batch first."
        )
