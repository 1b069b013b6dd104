"""What a model costs: parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recon.batches import call
from recon.branch_plan import BranchPlan
from recon.surgery import convert
from recon.undisturbed import undisturbed


@dataclass(frozen=True)
class Costs:
    """The cost of one forward pass on the example inputs.

    Args:
        parameters: how many scalars the parameters hold, tied ones once.
        macs: forward multiply-adds of convolutions and matrix products, for the whole batch of example inputs.
    """

    parameters: int
    macs: int


def costs(model: nn.Module, plan: BranchPlan | None, example_inputs: Any) -> Costs:
    """The costs of `model` branched by `plan`, counted by a dry run of the converted model in evaluation mode.

    Args:
        model: the unbranched model; with `plan=None`, any model, branched or not.
        plan: what would be branched.
        example_inputs: a batch of inputs, as the model's forward takes it.

    Raises:
        UnknownNameError, UsageError, FanError: as `recon.convert`.
    """
    if plan is not None:
        model = convert(model, plan, example_inputs)
    counter = FlopCounterMode(display=False)
    with undisturbed(model), torch.no_grad(), _unfused_kernels():
        model.eval()
        with counter:
            call(model, example_inputs)
    return Costs(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


@contextmanager
def _unfused_kernels() -> Iterator[None]:
    # The fused kernels of attention, transformer layers and LSTMs are opaque to the counter: they count as nothing.
    transformer, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(transformer)
        torch.backends.mkldnn.enabled = onednn  # a property, whatever its declared type
