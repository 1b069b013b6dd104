"""What torch.compile is told about fans: to leave the code that maps over them alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType

import torch
from torch import nn

from recon.branching.fans.statement import where
from recon.errors import FanError

_COMPILER = "torch._dynamo"
_OURS = (
    "recon.branching.fans recon.branching.modules recon.branching.partition recon.branching.surgery.per_task "
    "recon.branching.surgery.task_view recon.support.network.tensors recon.support.network.trees"
)


def leave_fans_alone() -> None:
    """Keep the compiler out of recon's own code; what this calls, with one group's tensors, may be compiled.

    A compiled part of a model (or the whole of it) would otherwise be traced into the code that maps over fans, and
    torch 2.14 then gives other outputs and gradients without a word. So a compiled function breaks its graph where it
    meets a fan, and the operation runs once per group, as always.
    """
    if _imported():
        _skip_our_files()
    else:
        sys.meta_path.insert(0, _TellCompiler())


def compile_anew(model: nn.Module) -> None:
    """Let the wrappers that torch.compile has put around submodules run what stands in their place now."""
    for module in model.modules():
        if _is_wrapper(module):  # its forward is bound to what it was made around
            module.__setstate__(module.__getstate__())


def uncompiled(view: nn.Module) -> None:
    """Let a view of a compiled submodule run its own children, not those of the module that was compiled."""
    vars(view).pop("_compiled_call_impl", None)
    if _is_wrapper(view):
        vars(view)["forward"] = view.get_submodule("_orig_mod").__call__


def refuse_full_graph() -> None:
    """Fail where values that differ between tasks meet code compiled with `fullgraph=True`, which takes no break.

    torch fails there as well, but in the first step, and with words about recon's own code. What torch 2.6 keeps of
    this option cannot be seen; there, its error is all.
    """
    if not _imported():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        entry = code.co_name == "compile_wrapper" and code.co_filename == torch._dynamo.eval_frame.__file__
        if entry and getattr(frame.f_locals.get("self"), "fullgraph", False):
            raise FanError(
                f"Values that differ between tasks meet code compiled with fullgraph=True{where()}: a compiled graph "
                "cannot map over them. Compile it without fullgraph=True, which breaks the graph there; or compile "
                "the program that recon.lower makes of the branched model."
            )
        frame = frame.f_back


def _is_wrapper(module: nn.Module) -> bool:
    return _imported() and isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _imported() -> bool:
    """Whether the compiler is there: before, nothing is compiled."""
    return _COMPILER in sys.modules


def _skip_our_files() -> None:
    for name in _OURS.split():
        torch._dynamo.trace_rules.add(name)


class _TellCompiler(MetaPathFinder):
    """Tells the compiler when somebody imports it, as everyone must who compiles.

    Its import takes a second. A model that is loaded to be run goes without it (dry runs and optimizers do not).
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The compiler's own, but that its module hears of us once it is executed."""
        spec = PathFinder.find_spec(name, path, target) if name == _COMPILER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            _skip_our_files()
            sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
