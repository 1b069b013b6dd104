"""Job: one training of a bench, in its own folder. Imports torch."""

from __future__ import annotations

import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from recon.errors import readable
from recon.experiments.bench.settings import BenchSettings, device_of
from recon.experiments.bench.variants import Variant
from recon.experiments.run import RUN_FILE, Run
from recon.experiments.training.evaluations import Evaluations
from recon.experiments.training.training import Training
from recon.profiling.conflict_counter import Counting
from recon.support.files.whole import make_folder

LOG_FILE = "training.log"


@dataclass(frozen=True)
class Job:
    """One training of the bench; it can be pickled."""

    settings: BenchSettings
    variant: Variant
    seed: int
    folder: Path

    def finished(self) -> Run | None:
        """The run in its folder, if it is finished."""
        run = Run.load(self.folder) if (self.folder / RUN_FILE).exists() else None
        return run if run is not None and run.finished else None


def weight(variant: Variant, tasks: int) -> float:
    """Roughly how many joint steps one of the variant's steps takes."""
    if variant.is_single_task:
        return tasks
    return (1 + bool(variant.plans)) * (1 if variant.method == "joint" else 1.5)


def train(job: Job) -> Run:
    """Train one run, or go on with it; messages go to its log."""
    make_folder(job.folder)
    with (job.folder / LOG_FILE).open("a", encoding="utf-8") as log, redirect_stderr(log):
        training = _training(job, log)
        run = training.run()
    for checkpoint in training.checkpoints:
        checkpoint.unlink(missing_ok=True)
    return run


def _training(job: Job, log: TextIO) -> Training:
    settings, variant = job.settings, job.variant
    return Training(
        problem=settings.problem(),
        folder=job.folder,
        epochs=settings.epochs,
        seed=job.seed,
        recipe=settings.recipe,
        device=device_of(settings),
        method=variant.method,
        train_samples=settings.train_samples,
        evaluations=Evaluations(every=settings.epochs, keep_best=False),
        resume=True,
        home=settings.as_dict()["PROBLEM"],
        plan=variant.plans[job.seed] if variant.plans else None,
        surgery=variant.surgery,
        counting=Counting(settings.threshold, settings.count_every) if variant.counted else None,
        tell=lambda text: print(readable(text), file=log, flush=True),
    )


def folder_name(label: str) -> str:
    """A run's label as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "-", label.replace("*", "-transferred")).strip("-")


def run_folder(bench: Path, label: str, seed: int) -> Path:
    """Where a run of a bench goes."""
    return bench / folder_name(label) / f"seed-{seed}"
