"""Count conflicts of gradients while a model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.profiling.profiler import Profiler
    from recon.profiling.warm_up import profile

__all__ = ["Profiler", "profile"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(__name__, {"Profiler": "profiler", "profile": "warm_up"})
