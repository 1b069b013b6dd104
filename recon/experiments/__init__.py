"""Check and train problems, compare the runs, and run benches: what the command line does, for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.experiments.backbones import with_backbone
    from recon.experiments.bench.bench import Bench
    from recon.experiments.bench.settings import BenchSettings
    from recon.experiments.bench.variants import Variant
    from recon.experiments.checks.check_up import check
    from recon.experiments.checks.report import CheckReport
    from recon.experiments.comparison import compare
    from recon.experiments.inputs import make_loaders, make_model
    from recon.experiments.recipe import Recipe
    from recon.experiments.run import Run
    from recon.experiments.training.training import Training

__all__ = [
    "Bench",
    "BenchSettings",
    "CheckReport",
    "Recipe",
    "Run",
    "Training",
    "Variant",
    "check",
    "compare",
    "make_loaders",
    "make_model",
    "with_backbone",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "Bench": "bench.bench",
            "BenchSettings": "bench.settings",
            "CheckReport": "checks.report",
            "Recipe": "recipe",
            "Run": "run",
            "Training": "training.training",
            "Variant": "bench.variants",
            "check": "checks.check_up",
            "compare": "comparison",
            "make_loaders": "inputs",
            "make_model": "inputs",
            "with_backbone": "backbones",
        },
    )
