"""Count what a forward pass computes and stores, while it runs: multiply-adds and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from recon.support.network.forward import call, fresh, run
from recon.support.network.state import state_kept
from recon.support.network.tensors import storage_of


class KernelMeter(TorchDispatchMode):
    """Adds up what kernels compute and make.

    `FlopCounterMode` itself leaves hooks on parameters that a module is called with, and accepts no fans there.

    Attributes:
        macs: multiply-adds of convolutions and matrix products, as `torch.utils.flop_counter` knows them.
        bytes: of the tensors that were made; what shares memory with an input (a view, a write in place) is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel, and count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **kwargs, out_val=result) // 2
        given = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        made = {storage_of(tensor): byte_size(tensor) for tensor in tensors_in(result)}
        self.bytes += sum(size for storage, size in made.items() if storage not in given)
        return result


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return (leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor))


def byte_size(tensor: Tensor) -> int:
    """The bytes of a tensor's elements; of those that are stored, for a sparse one."""
    return tensor.element_size() * (tensor.numel() if tensor.layout == torch.strided else tensor._nnz())


def count_macs(model: nn.Module, inputs: Any) -> int:
    """The multiply-adds of convolutions and matrix products in one forward in evaluation mode."""
    inputs = fresh(inputs)
    with state_kept(model), torch.no_grad(), unfused_kernels(), KernelMeter() as meter:
        call(model.eval(), inputs)
    return meter.macs


def count_activation_bytes(model: nn.Module, inputs: Any) -> int:
    """The bytes of all tensors that one forward in training mode makes."""
    inputs = fresh(inputs)
    with state_kept(model), torch.enable_grad(), unfused_kernels(), KernelMeter() as meter:
        run(model.train(), inputs)
    return meter.bytes


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """How many scalars these hold."""
    return sum(p.numel() for p in parameters)


@contextmanager
def unfused_kernels() -> Iterator[None]:
    """Compute attention, transformer layers and LSTMs step by step: fused, they count as nothing."""
    transformer, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(transformer)
        torch.backends.mkldnn.enabled = onednn  # a property, whatever its declared type
