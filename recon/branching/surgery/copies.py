"""Copy a model, the layers that a plan branches, and the statistics that differ between tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from recon.branching.fans.compilers import renew_wrappers
from recon.branching.modules.branched import Branched, BranchedParameter
from recon.branching.modules.statistics import keep_by_group
from recon.branching.partition import Group, Partition, refine
from recon.errors import UsageError
from recon.support.network.layers import find_layers, module_at, places
from recon.support.network.references import STRUCTURE, redirect_references


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of the model."""
    try:
        # With gradients on, the copy of a scripted module would depend on the original's parameters.
        with torch.no_grad(), _DetachedCopies():
            twin = copy.deepcopy(model)
        for original, parameter in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad)
        return twin
    except Exception as error:
        raise UsageError(
            f"The model cannot be copied{_uncopied(model)}: {type(error).__name__}: {error}. It must hold nothing "
            "that copy.deepcopy cannot copy (a lock, an open file, a generator); make such things on first use."
        ) from error


def _uncopied(model: nn.Module) -> str:
    """The attribute that cannot be copied, in words."""
    memo = {id(part): part for part in [*model.modules(), *model.parameters(), *model.buffers()]}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                with _DetachedCopies():
                    copy.deepcopy(value if name not in STRUCTURE else None, dict(memo))
            except Exception:
                return f", because of {'.'.join(filter(None, (path, name)))!r} ({type(value).__name__})"
    return ""


class _DetachedCopies(TorchFunctionMode):
    """Copies the tensors that a forward left in a model without their graph, which torch cannot copy.

    They are activations kept as attributes, or weights that a hook made (pruning, `weight_norm`): the next forward
    makes new ones.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def branch_layers(model: nn.Module, layers: Mapping[str, Partition]) -> None:
    """Put a branched layer in every place where the model reaches one of these layers."""
    copies = _ParameterCopies(
        {
            p: layers[layer.name]
            for layer in find_layers(model)
            if layer.name in layers
            for p in layer.parameters.values()
        }
    )
    branched: dict[nn.Module, nn.Module] = {}
    for place in list(places(model)):
        partition = copies.partition_of(place.parameters.values())
        if partition is None:
            continue
        if isinstance(place.owner, nn.Parameter):
            if place.parent._parameters[place.attribute] is None:  # done already: the container has two paths
                continue
            parameters = {group: copies.get(place.owner, group) for group in partition.groups}
            BranchedParameter(place.path, partition, parameters).put_into(place.parent)
            continue
        if place.owner not in branched:  # a module reached by two paths is branched once
            modules = {group: copies.module(place.owner, group) for group in partition.groups}
            branched[place.owner] = Branched(place.path, partition, modules)
        setattr(place.parent, place.attribute, branched[place.owner])
    redirect_references(model.modules(), lambda module: branched.get(module, module))
    renew_wrappers(model)


class _ParameterCopies:
    """One copy of each branched parameter per group, however many modules hold it."""

    def __init__(self, partitions: Mapping[nn.Parameter, Partition]) -> None:
        self.partitions = partitions
        self.copies: dict[tuple[nn.Parameter, Group], nn.Parameter] = {}

    def partition_of(self, parameters: Iterable[nn.Parameter]) -> Partition | None:
        """The groups of a module with these parameters: tied weights may bring in several layers' partitions."""
        found = [self.partitions[p] for p in parameters if p in self.partitions]
        return refine(*found) if found else None

    def get(self, parameter: nn.Parameter, group: Group) -> nn.Parameter:
        partition = self.partitions.get(parameter)
        if partition is None:
            return parameter
        label = partition.label_of[group[0]]
        if label == 0:  # the first group takes over the original: nothing is copied needlessly
            return parameter
        key = (parameter, partition.groups[label])
        if key not in self.copies:
            self.copies[key] = copy.deepcopy(parameter)
        return self.copies[key]

    def module(self, module: nn.Module, group: Group) -> nn.Module:
        if group[0] == next(iter(self.partitions.values())).tasks[0]:  # as above; handles of hooks keep their module
            return module
        memo: dict[int, Any] = {id(p): self.get(p, group) for p in module.parameters()}
        return copy.deepcopy(module, memo)


def split_statistics(model: nn.Module, statistics: Mapping[str, Partition]) -> None:
    """Let these modules keep their buffers by group."""
    for path, partition in statistics.items():
        keep_by_group(module_at(model, path), partition)
