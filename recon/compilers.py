"""What torch.compile is told about fans: to leave the code that maps over them alone."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame, trace_rules
from torch._dynamo.eval_frame import OptimizedModule

from recon.errors import FanError
from recon.statement import where

_OURS = (
    "autograd_functions branched_statistics branches fan fan_trees fan_writes hooks packing partition past_python "
    "per_task serving statement surgical_classes trees unmappable value views watch"
)


def leave_fans_alone() -> None:
    """Keep the compiler out of recon's own code; what this calls, with one group's tensors, may be compiled.

    A compiled part of a model (or the whole of it) would otherwise be traced into the code that maps over fans, and
    torch 2.14 then gives other outputs and gradients without a word. So a compiled function breaks its graph where it
    meets a fan, and the operation runs once per group, as always.
    """
    for name in _OURS.split():
        trace_rules.add(f"recon.{name}")


def without_compiler() -> AbstractContextManager[Any]:
    """Run compiled parts uncompiled: a dry run looks on at operations, and `fullgraph=True` would fail on that."""
    return torch.compiler.set_stance("force_eager")


def compile_anew(model: nn.Module) -> None:
    """Let the wrappers that torch.compile has put around submodules run what stands in their place now."""
    for module in model.modules():
        if isinstance(module, OptimizedModule):  # its forward is bound to what it was made around
            module.__setstate__(module.__getstate__())


def uncompiled(view: nn.Module) -> None:
    """Let a view of a compiled submodule run its own children, not those of the module that was compiled."""
    vars(view).pop("_compiled_call_impl", None)
    if isinstance(view, OptimizedModule):
        vars(view)["forward"] = view.get_submodule("_orig_mod").__call__


def refuse_full_graph() -> None:
    """Fail where values that differ between tasks meet code compiled with `fullgraph=True`, which takes no break.

    torch fails there as well, but in the first step, and with words about recon's own code. What torch 2.6 keeps of
    this option cannot be seen; there, its error is all.

    Raises:
        FanError: they do.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        entry = code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__
        if entry and getattr(frame.f_locals.get("self"), "fullgraph", False):
            raise FanError(
                f"Values that differ between tasks meet code compiled with fullgraph=True{where()}: a compiled graph "
                "cannot map over them. Compile it without fullgraph=True, which breaks the graph there; or compile "
                "the program that recon.lower makes of the branched model."
            )
        frame = frame.f_back
