"""Count the conflicts of a training while it runs: a profiler that counts whole gradients too. Imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recon import profiling
from recon.errors import CheckpointError
from recon.maps.counts import BINS, Counts
from recon.methods.gradients.gramians import gramian
from recon.methods.gradients.jacobian import TaskJacobian
from recon.profiling.tally import Tally
from recon.support.files.documents import read_document
from recon.support.files.whole import write_text

CONFLICTS_FILE = "conflicts.json"
"""The conflict map of a training, in its run's folder."""

COSINES_FILE = "cosines.json"
"""The cosines over all its shared parameters together."""

_FORMAT, _VERSION = "recon cosines", 1


@dataclass(frozen=True)
class Counting:
    """How a training's conflicts are counted."""

    threshold: float = -0.1  # S, see `recon.Profiler`
    every: int = 1  # count at the first and then each n-th step


class ConflictCounter(profiling.Profiler):
    """A profiler that also counts the cosines between the tasks' whole gradients, over all shared parameters.

    Those are what Recon's authors show before and after branching (Shi et al. 2023, tables 6 and 8 to 10).
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], counting: Counting) -> None:
        super().__init__(model, counting.threshold, tasks, every=counting.every)
        self._numbers = {task: number for number, task in enumerate(tasks)}
        self._whole = Tally(1, counting.threshold, self.device)

    @torch.no_grad()
    def observe(self, jacobian: TaskJacobian) -> None:
        """See `recon.Profiler.observe`."""
        super().observe(jacobian)
        whole = gramian(jacobian).to(self.device)
        self._whole.add([0], [self._numbers[task] for task in jacobian.tasks], whole[None])

    @property
    def whole_histogram(self) -> Counts:
        """(200,) cosines on the 0.01 grid, as `recon.maps.LayerConflicts.histogram`."""
        return self._whole.histogram[0].numpy()

    def state_dict(self) -> dict[str, Any]:
        """See `recon.Profiler.state_dict`."""
        return {**super().state_dict(), "whole": self._whole.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `recon.Profiler.load_state_dict`."""
        super().load_state_dict(state)
        self._whole.load_state_dict(state["whole"])

    def save(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        """Write the conflict map and the cosines into a run's folder."""
        self.conflict_map(made_by).save(folder / CONFLICTS_FILE)
        document = {"format": _FORMAT, "version": _VERSION, "histogram": self.whole_histogram.tolist()}
        write_text(folder / COSINES_FILE, json.dumps(document) + "\n")


def read_cosines(folder: Path) -> Counts:
    """What `ConflictCounter.save` wrote of the whole gradients' cosines."""
    document = read_document(folder / COSINES_FILE, CheckpointError, "Delete the folder of the run to train it again.")
    document.check_format(_FORMAT, _VERSION)
    counts = document.counts("histogram")
    if len(counts) != BINS:
        document.wrong("histogram", f"has {len(counts)} counts, not {BINS}")
    return np.array(counts, dtype=np.int64)
