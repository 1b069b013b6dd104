"""What `recon demo` prints in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from recon import branching, maps
from recon.experiments.comparison import compare
from recon.experiments.run import Run
from recon.support.tables import text_table

Results = dict[str, dict[str, float]]
Shares = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What one training gave: its test results, and the share of steps with cos < 0 by shared layer if counted."""

    results: Results
    conflicts: Shares


@dataclass(frozen=True)
class Story:
    """What was measured, as text and as plain values.

    Args:
        seeds: how often everything was trained.
        epochs: of every training.
        surgery: what the tables call Recon's plan.
        cmap: the conflict map.
        plan: Recon's plan.
        runs: each variant's mean results and its costs.
        outcomes: each variant's outcomes, by seed.
        before: the share of conflicting steps by shared layer in joint training.
        after: the same with Recon.
        minutes: what it took.
    """

    seeds: int
    epochs: int
    surgery: str
    cmap: maps.ConflictMap
    plan: branching.BranchPlan
    runs: dict[str, Run]
    outcomes: Mapping[str, Sequence[Outcome]]
    before: Shares
    after: Shares
    minutes: float

    def data(self) -> dict[str, Any]:
        """As plain values, for `results.json` and --json."""
        return {
            **compare(self.runs).as_dict(),
            "seeds": self.seeds,
            "epochs": self.epochs,
            "branched_layers": list(self.plan.layers),
            "results_by_seed": {label: [o.results for o in outcomes] for label, outcomes in self.outcomes.items()},
            "conflicting_steps": {"before": self.before, "after": self.after},
            "profiled_steps": self.cmap.steps,
            "minutes": self.minutes,
        }

    def text(self, folder: Path) -> str:
        """As text; `folder` is where everything was saved."""
        return "\n".join(
            [
                f"digits: {self.epochs} epochs each, mean of {self.seeds} seed(s). Accuracies on the test pairs;",
                "Δm is against one model for each task; ms/step was measured for all in turn, on one thread.",
                "",
                compare(self.runs).text(),
                "",
                self._spread(),
                "",
                f"Recon branched {len(self.plan.layers)} of {len(self.cmap.layers)} shared layers:",
                f"  {', '.join(self.plan.layers)}",
                "",
                "Conflicting steps (cos < 0), in %, in the layers that stay shared, under joint training:",
                "",
                self._conflicts(),
                "",
                f"{self.minutes:.1f} minutes. Saved in {folder}: map.json, results.json, conflicts_by_layer.png,",
                f"conflicts_before_after.png, and branched/, the model of pcgrad + {self.surgery} with seed 0.",
            ]
        )

    def _spread(self) -> str:
        """How far the seeds of one variant lie apart: differences in the table below that are noise."""
        if self.seeds == 1:
            return "One seed: differences of a few tenths of a point are noise. See `--seeds`."
        means = {
            label: [fmean(value for metrics in o.results.values() for value in metrics.values()) for o in outcomes]
            for label, outcomes in self.outcomes.items()
        }
        widest = max(max(values) - min(values) for values in means.values())
        return f"Between its seeds, the mean accuracy of one row differs by up to {widest:.4f}."

    def _conflicts(self) -> str:
        kept = [name for name in self.before if name in self.after]
        rows = [[name, f"{100 * self.before[name]:.1f}", f"{100 * self.after[name]:.1f}"] for name in kept]
        if kept:
            means = (fmean(shares[name] for name in kept) for shares in (self.before, self.after))
            rows.append(["mean", *(f"{100 * mean:.1f}" for mean in means)])
        return text_table(["layer", "joint", f"joint + {self.surgery}"], rows)
