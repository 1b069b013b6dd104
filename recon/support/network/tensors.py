"""Which tensors share memory, and whether one was written into."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedTensor:
    """A tensor among the arguments of an operation that may write into it, whatever its name."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version
        # F.batch_norm does not count its writes; no operation writes into what requires a gradient uncounted.
        self.value = None if tensor.requires_grad else tensor.clone()

    @property
    def changed(self) -> bool:
        """Whether it was written into since."""
        if self.tensor._version != self.version:
            return True
        return self.value is not None and not equal(self.value, self.tensor)


def equal(tensor: Tensor, other: Tensor) -> bool:
    """`torch.equal`, and yes for sparse tensors, which it does not take."""
    return tensor.layout != torch.strided or torch.equal(tensor, other)


def storage_of(tensor: Tensor) -> int:
    """What tells tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
