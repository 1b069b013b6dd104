"""The progress bar of a training: throughput from tqdm, and the losses every so often."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tqdm import tqdm

from recon.batch_stream import batch_count
from recon.batches import Batch
from recon.training_run import TrainingRun

_SECONDS = 2.0  # between two looks at the losses: each waits for the device


def with_bar(run: TrainingRun, epochs: int, show: bool) -> Iterator[Batch]:
    """The batches of the epoch that are not done yet, with a bar on stderr."""
    if not show:
        yield from run.batches()
        return
    title, total = f"epoch {run.epoch}/{epochs}", batch_count(run.stream.loader)
    bar = tqdm(run.batches(), title, total, initial=run.stream.drawn, leave=False, unit="batch")
    looked = time.monotonic()
    for batch in bar:
        yield batch
        if time.monotonic() - looked >= _SECONDS:
            looked = time.monotonic()
            bar.set_postfix({task: f"{loss:.4f}" for task, loss in run.meter.mean_losses().items()})
