"""Which tensors share memory, and whether one was written into."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedTensor:
    """A tensor among the arguments of an operation that may write into it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version
        # F.batch_norm does not count its writes: compare values. All writes into what requires a gradient are counted.
        self.value = None if tensor.requires_grad else tensor.clone()

    @property
    def changed(self) -> bool:
        """Whether it was written into after this object was made."""
        if self.tensor._version != self.version:
            return True
        return self.value is not None and not equal(self.value, self.tensor)


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, so that inner products of gradients are those of real gradient descent."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def equal(tensor: Tensor, other: Tensor) -> bool:
    """`torch.equal`, and True for sparse tensors, which it does not accept."""
    return tensor.layout != torch.strided or torch.equal(tensor, other)


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
