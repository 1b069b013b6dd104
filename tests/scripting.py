"""torch.jit.script for a process that has done much else before."""

from __future__ import annotations

import copy

import torch
from torch import nn


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """The scripted module.

    TorchScript knows builtin functions by their address and keeps those of functions that are gone; then it takes what
    lies there now, such as an attribute of a module, for the function. A copy lies elsewhere.
    """
    kept = [module]
    while True:
        try:
            return torch.jit.script(kept[-1])
        except RuntimeError as error:
            if "builtin cannot be used as a value" not in str(error) or len(kept) > 20:
                raise
            kept.append(copy.deepcopy(module))
