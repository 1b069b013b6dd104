"""Which tasks use which layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recon.support.network.forward import task_outputs
from recon.support.network.graph import reached_leaves
from recon.support.network.layers import find_layers
from recon.support.network.state import state_kept


def tasks_by_layer(model: nn.Module, tasks: Sequence[str], inputs: Any) -> dict[str, list[str]]:
    """`{layer: the tasks whose outputs send gradients to it}`, read off the autograd graph of one training forward."""
    with state_kept(model), torch.enable_grad():
        outputs = task_outputs(model.train(), inputs, tasks)
        reached = {t: reached_leaves([v for v in tree_leaves(outputs[t]) if isinstance(v, Tensor)]) for t in tasks}
    return {
        layer.name: [task for task in tasks if not reached[task].isdisjoint(layer.parameters.values())]
        for layer in find_layers(model)
    }


def wasted_copies(model: nn.Module, layers: Collection[str], tasks: Sequence[str], inputs: Any) -> list[str]:
    """A note on each of the layers to branch that one task alone trains."""
    return [
        f"{name}: used by task {using[0]} alone, so the other tasks' copies are never trained."
        for name, using in tasks_by_layer(model, tasks, inputs).items()
        if name in layers and len(using) == 1
    ]
