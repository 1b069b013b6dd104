"""Give each task its own copy of a layer: conversion, verification, saving and deployment of branched models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.branching.conversion import convert
    from recon.branching.extract import extract_task
    from recon.branching.lowering import lower
    from recon.branching.partition import Partition
    from recon.branching.plan import BranchPlan, plan_of
    from recon.branching.saving import load, load_plan, save
    from recon.branching.verification import Verification, verify

__all__ = [
    "BranchPlan",
    "Partition",
    "Verification",
    "convert",
    "extract_task",
    "load",
    "load_plan",
    "lower",
    "plan_of",
    "save",
    "verify",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "BranchPlan": "plan",
            "Partition": "partition",
            "Verification": "verification",
            "convert": "conversion",
            "extract_task": "extract",
            "load": "saving",
            "load_plan": "saving",
            "lower": "lowering",
            "plan_of": "plan",
            "save": "saving",
            "verify": "verification",
        },
    )
