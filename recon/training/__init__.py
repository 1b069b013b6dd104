"""Train a plain or a branched model with any method, and evaluate it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.training.batches.batch_stream import RankBatches
    from recon.training.batches.joint_batches import joint_loader
    from recon.training.evaluation import delta_m, evaluate
    from recon.training.history import Epoch, History
    from recon.training.recorder import Recorder
    from recon.training.trainer import train

__all__ = ["Epoch", "History", "RankBatches", "Recorder", "delta_m", "evaluate", "joint_loader", "train"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "Epoch": "history",
            "History": "history",
            "RankBatches": "batches.batch_stream",
            "Recorder": "recorder",
            "delta_m": "evaluation",
            "evaluate": "evaluation",
            "joint_loader": "batches.joint_batches",
            "train": "trainer",
        },
    )
