"""Choice: a plan, what led to it, and how far the map bears it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recon.branching import BranchPlan
from recon.maps.measures import By
from recon.support.tables import counted


@dataclass(frozen=True)
class Choice:
    """A plan, and what led to it.

    Args:
        plan: the plan.
        reason: how its layers were chosen.
        scores: `{shared layer: score}` over the pairs of the plan's tasks, of all that the map has.
        parted: `{shared layer: what branching it would part}`: its score without the conflicts within its groups; its
            score with one group a task.
        units: `{unit: the layers that it joins}`, of the shared layers that are units.
        by: what the scores are, see `recon.maps.measures.By`.
        unmeasured: the pairs of the plan's tasks that never met in a step of the profile: the scores know nothing of
            them.
        sure: `{shared layer: how likely it conflicts above its noise floor}`, where `auto` chose by that.
        notes: what to know before trusting the plan, a sentence or two each.
    """

    plan: BranchPlan
    reason: str
    scores: Mapping[str, float]
    parted: Mapping[str, float]
    units: Mapping[str, Sequence[str]] = field(default_factory=dict)
    by: By = "count"
    unmeasured: Sequence[tuple[str, str]] = ()
    sure: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        chosen = self.scored
        all_scored = set(self.plan.layers) == {m for name in chosen for m in self.units.get(name, [name])}
        if all_scored:
            return f"{len(chosen)} of {counted(len(self.scores), 'shared layer')}: {self.reason}"
        return f"{counted(len(self.plan.layers), 'layer')}: {self.reason}"

    @property
    def scored(self) -> list[str]:
        """The shared layers and units that the plan branches, a unit by all its layers."""
        return [name for name in self.scores if set(self.units.get(name, [name])) <= set(self.plan.layers)]

    @property
    def total(self) -> float:
        """The sum of all scores."""
        return sum(self.scores.values())

    @property
    def covered(self) -> float:
        """What the plan parts, as a share of all conflict that was measured; 0 if there is none."""
        return sum(self.parted[name] for name in self.scored) / self.total if self.total else 0.0
