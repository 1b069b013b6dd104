"""BenchRuns: everything that a bench found. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from recon.experiments.bench import cosines as bench_cosines
from recon.experiments.bench.cosines import Cosines
from recon.experiments.bench.job import run_folder
from recon.experiments.bench.table import paper_key
from recon.experiments.bench.variants import Variant
from recon.experiments.comparison import Comparison, compare
from recon.experiments.pictures import before_after
from recon.experiments.run import Run
from recon.maps import ConflictMap
from recon.maps.pictures.heatmap import heatmap

JOINT = "joint"
"""The variant that cost ratios and the cosines of the others refer to."""


@dataclass(frozen=True)
class BenchRuns:
    """Everything that a bench found."""

    folder: Path
    cmap: ConflictMap
    top_k: int  # how many layers Recon branches
    variants: list[Variant]  # in the order of the table
    notes: list[str]  # what a reader should know of them
    runs: dict[str, list[Run]]  # each variant's, by seed
    seconds: dict[str, float]  # of each variant's training step

    @cached_property
    def comparison(self) -> Comparison:
        """The variants side by side; costs refer to joint training, or else to the first plain model."""
        return compare(self.runs, reference=JOINT if JOINT in self.runs else None, seconds=self.seconds)

    @cached_property
    def cosines(self) -> list[Cosines]:
        """What was counted in each variant, plain joint training first."""
        counted = [variant for variant in self.variants if variant.counted]
        counted.sort(key=lambda variant: variant.label != JOINT)
        found = []
        for variant in counted:
            folders = [run_folder(self.folder, variant.label, seed) for seed in range(len(self.runs[variant.label]))]
            found.append(bench_cosines.read(variant.label, paper_key(variant.method, variant.surgery), folders))
        return found

    @property
    def before(self) -> Cosines | None:
        """What was counted in plain joint training, if that is among the variants."""
        return next((one for one in self.cosines if one.title == JOINT), None)

    @property
    def after(self) -> Cosines | None:
        """What was counted in joint training with Recon."""
        return next((one for one in self.cosines if one.title == self.branched), None)

    @property
    def branched(self) -> str:
        """The label of joint training with Recon."""
        return f"{JOINT} + Recon K={self.top_k}"

    def draw(self, folder: Path) -> None:
        """Two pictures: conflicts by layer, and those of joint training before and after branching."""
        if self.before is None or self.after is None:
            return
        plan = next(variant.plans[0] for variant in self.variants if variant.label == self.branched)
        heatmap(self.cmap, folder / "conflicts_by_layer.png", branched=list(plan.layers))
        if bench_cosines.kept_layers(self.before, self.after):
            shares = self.before.conflicts, self.after.conflicts
            before_after(*shares, folder / "conflicts_before_after.png")
