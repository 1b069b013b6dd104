"""Fans in compiled models: keep torch.compile out of the code that maps over fans."""

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
    """Keep the compiler out of recon's own code; what that code calls for one group may still be compiled.

    Otherwise the compiler would trace into the code that maps over fans, and torch 2.14 would silently compute other
    outputs and gradients. So a compiled function breaks its graph where it gets a fan, and the operation runs once
    per group, as always.
    """
    if _imported():
        _skip_our_files()
    else:
        sys.meta_path.insert(0, _TellCompiler())


def renew_wrappers(model: nn.Module) -> None:
    """Let torch.compile's wrappers around submodules run the modules that have replaced these."""
    for module in model.modules():
        if _is_wrapper(module):  # its forward is bound to the module it was made for
            module.__setstate__(module.__getstate__())


def uncompiled(view: nn.Module) -> None:
    """Let a view of a compiled submodule run its own children, not those of the module that was compiled."""
    vars(view).pop("_compiled_call_impl", None)
    if _is_wrapper(view):
        vars(view)["forward"] = view.get_submodule("_orig_mod").__call__


def refuse_full_graph() -> None:
    """Raise FanError where fans reach code compiled with `fullgraph=True`, which allows no break of the graph.

    torch fails there too, but only in the first step, and with a message about recon's code. In torch 2.6 the option
    cannot be read, so users get torch's message.
    """
    if not _imported():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        entry = code.co_name == "compile_wrapper" and code.co_filename == torch._dynamo.eval_frame.__file__
        if entry and getattr(frame.f_locals.get("self"), "fullgraph", False):
            raise FanError(
                f"Values that differ between tasks reach code compiled with fullgraph=True{where()}: one graph "
                "cannot map over them. Compile it without fullgraph=True, so that the graph breaks there; or compile "
                "the program that recon.lower makes of the branched model."
            )
        frame = frame.f_back


def _is_wrapper(module: nn.Module) -> bool:
    return _imported() and isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _imported() -> bool:
    """Whether the compiler is imported; until then, nothing is compiled."""
    return _COMPILER in sys.modules


def _skip_our_files() -> None:
    for name in _OURS.split():
        torch._dynamo.trace_rules.add(name)


class _TellCompiler(MetaPathFinder):
    """Waits until somebody imports the compiler, and then tells it to leave fans alone.

    That import takes a second, which a model that is only loaded and run need not wait for.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The compiler's own spec; once its module is executed, it is told about fans."""
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
