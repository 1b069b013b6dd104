"""Run or change a model and put everything back; copy, compare and perturb its state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recon.support.network.references import STRUCTURE
from recon.support.network.tensors import equal, storage_of


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward changes: modes, parameters, buffers, what modules remember, and the random state."""
    kept = [(module, _KeptAttributes(module), _KeptBuffers(module)) for module in model.modules()]
    parameters = [_KeptTensor(p) for p in model.parameters() if type(p.data) is Tensor and not is_lazy(p)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        try:
            yield
        finally:
            for module, attributes, buffers in kept:
                attributes.put_back(module)
                buffers.put_back(module)
            for parameter in parameters:
                parameter.put_back()


class _KeptAttributes:
    """What a module's attributes are, and what the lists, dicts and sets among them hold."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(vars(module))
        self.contents = [
            (value, copy.copy(value))
            for name, value in self.attributes.items()
            if name not in STRUCTURE and isinstance(value, (list, dict, set))
        ]

    def put_back(self, module: nn.Module) -> None:
        vars(module).clear()
        vars(module).update(self.attributes)
        for container, content in self.contents:
            refill(container, content)


def refill(container: list[Any] | dict[Any, Any] | set[Any], content: Any) -> None:
    """Give a list, dict or set the content of another one."""
    content = copy.copy(content)
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


class _KeptTensor:
    """Where a tensor keeps its values, and the values: a forward may normalise or clip its own weights."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data, self.value = tensor, tensor.data, tensor.detach().clone()

    @torch.no_grad()
    def put_back(self) -> None:
        tensor = self.tensor
        if storage_of(tensor) != storage_of(self.data):  # `tensor.data = value`, which its views do not see
            tensor.data = self.data
        if not tensor.is_meta and not equal(tensor, self.value):
            tensor.copy_(self.value)


class _KeptBuffers:
    """What a module's own buffers are, where they keep their values, and the values."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = dict(module._buffers)
        self.kept = [_KeptTensor(buffer) for buffer in self.buffers.values() if buffer is not None]

    def put_back(self, module: nn.Module) -> None:
        now = module._buffers
        for name in set(now.keys()).difference(self.buffers):  # scripted modules have no other way
            del now[name]
        for name, buffer in self.buffers.items():
            if now[name] is not buffer:
                now[name] = buffer
        for kept in self.kept:
            kept.put_back()


def buffer_values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's own buffers."""
    return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}


def equal_values(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two modules' buffers are the same."""
    return values.keys() == others.keys() and all(
        type(others[name]) is Tensor and equal(value, others[name]) for name, value in values.items()
    )


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    """Add a little noise to every parameter, so that no two copies stay equal and no gain stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        parameter.add_(noise * (0.1 * parameter.abs().mean() + 0.01))


@torch.no_grad()
def move_statistics(model: nn.Module) -> None:
    """Change every buffer a little."""
    # Statistics that already equal the example's would not change, as if they were never written.
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.layout == torch.strided and buffer.is_contiguous():
            buffer.mul_(1.01)
