"""ConflictCounts: what a profiler has counted, of layers by their number and of tasks as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import CheckpointError, UsageError, shortened
from recon.maps import ConflictMap
from recon.maps.counts import Counts
from recon.methods.gradients.sparse import entries
from recon.profiling.counted_map import counted_map
from recon.profiling.floor import Comparison
from recon.profiling.tally import Tally
from recon.support.network.layers import Layer
from recon.support.tables import counted
from recon.training.batches.meetings import nobody_meets


class ConflictCounts:
    """The tally of a profile, made with its first step; the layers that were shared in any, and the tasks.

    Args:
        layers: those that count.
        threshold: S, see `recon.Profiler`.
        tasks: fixes their order; found as they come when not given.
    """

    def __init__(self, layers: Sequence[Layer], threshold: float, tasks: Sequence[str]) -> None:
        self.layers = layers
        self.threshold = threshold
        self.tasks = list(tasks)
        self.shared: set[int] = set()
        self.seen: dict[str, int] = {}  # in how many steps each task was
        self.met = False  # whether two tasks were in one step
        self._tally: Tally | None = None

    @property
    def steps(self) -> int:
        """How many steps were counted."""
        return 0 if self._tally is None else self._tally.steps

    def add(
        self,
        layers: Sequence[int],
        tasks: Sequence[str],
        gramians: Tensor,
        others: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Count one step, unless a gradient was not finite: one in the Gramians, or one of the others."""
        others = [numbers for gradient in others if (numbers := entries(gradient)).numel()]
        if others:
            largest = nn.utils.get_total_norm(others, norm_type=math.inf).to(gramians)
            gramians = gramians.where(largest.isfinite(), math.nan)
        if self._tally is None:
            self._tally = Tally(len(self.layers), self.threshold, device)
        self.shared.update(layers)
        self.tasks += [task for task in tasks if task not in self.tasks]
        self.seen |= {task: self.seen.get(task, 0) + 1 for task in tasks}
        self.met |= len(tasks) > 1
        self._tally.add(layers, self._numbers(tasks), gramians.to(device))

    def add_floor(self, found: Comparison) -> None:
        """Count the comparison of a step that was counted with a second batch."""
        assert self._tally is not None
        self._tally.add_floor(found.layers, self._numbers(found.tasks), found.products, found.norms, found.second_norms)

    def series(self) -> tuple[Counts, int]:
        """(B, L) conflicts of the shared layers by bin of steps, and the steps of a bin."""
        assert self._tally is not None
        counts, bin_steps = self._tally.series()
        return counts[:, sorted(self.shared)].numpy(), bin_steps

    def refuse_none_met(self) -> None:
        """Refuse a profile in which no two tasks have met.

        Raises:
            NobodyMeetsError: every step had one task alone.
        """
        if self.steps and not self.met:
            raise nobody_meets(self.steps, self.seen)

    def conflict_map(self, made_by: Mapping[str, Any], chosen: bool) -> ConflictMap:
        """What has been counted so far; `chosen` says that the layers are not all there are.

        Raises:
            UsageError: nothing was counted, no two tasks have met in a step, or no layer is shared.
            GradientError: no step had finite gradients.
        """
        if self._tally is None:
            raise UsageError("Nothing was profiled yet: call profiler.backward(losses) in the training loop first.")
        self.refuse_none_met()
        shared = {number: self.layers[number] for number in sorted(self.shared)}
        if chosen and not shared:
            names = shortened(layer.name for layer in self.layers)
            one = len(self.layers) == 1
            what = "The layer that was chosen" if one else f"None of the {len(self.layers)} layers that were chosen"
            raise UsageError(
                f"{what} ({names}) is {'not ' * one}shared: in none of {counted(self.steps, 'step')} did the losses of "
                f"two tasks depend on {'it' if one else 'one of them'}. Choose layers of the common backbone."
            )
        return counted_map(self._tally, shared, self.tasks, made_by)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was counted."""
        return {
            "tasks": list(self.tasks),
            "shared": sorted(self.shared),
            "seen": dict(self.seen),
            "met": self.met,
            "tally": None if self._tally is None else self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        self.tasks = list(state["tasks"])
        self.shared = set(state["shared"])
        self.seen = dict(state.get("seen", {}))  # profiles from before did not note it
        self.met = state.get("met", True)
        self._tally = None
        if state["tally"] is not None:
            self._tally = Tally(len(self.layers), self.threshold, device)
            self._tally.load_state_dict(state["tally"])

    def _numbers(self, tasks: Sequence[str]) -> list[int]:
        return [self.tasks.index(task) for task in tasks]


def refuse_other_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on from the saved state of a profiler with other settings than these."""
    for name, value in settings.items():
        if name not in state:
            raise CheckpointError(f"This is not the saved state of a profiler: it has no {name}.")
        if state[name] != value:
            raise CheckpointError(
                f"The saved profile has other {name}: {state[name]}, not {value}. Use the settings of "
                "the interrupted run, or start over."
            )
