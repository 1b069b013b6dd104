"""The demo: a bench of the problem `digits`, and its report. Imports torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from recon.branching import load, save
from recon.experiments.bench.bench import MAP_FILE, RESULTS_FILE, Bench
from recon.experiments.bench.job import run_folder
from recon.experiments.bench.presets import DEMO
from recon.experiments.bench.runs import BenchRuns
from recon.experiments.bench.settings import BenchSettings
from recon.experiments.bench.variants import one_thread
from recon.experiments.comparison import Comparison, compare
from recon.experiments.inputs import make_model
from recon.experiments.run import Run
from recon.experiments.training.training import silent
from recon.support.files.documents import json_values
from recon.support.files.whole import write_text
from recon.support.tables import counted, text_table

PROBLEM = "digits"


@dataclass(frozen=True)
class Demo:
    """The demo on the problem `digits`."""

    folder: Path  # gets the map, the branched model, the results and the pictures; the runs go to `runs/`
    seeds: int
    epochs: int
    top_k: int  # how many layers are branched
    device: torch.device
    workers: int
    tell: Callable[[str], None] = silent  # is given a line of text whenever something is done

    @property
    def bench(self) -> Bench:
        """The bench; a demo of other settings, in the same folder, has another one."""
        settings = BenchSettings(
            problem_name=PROBLEM,
            preset=DEMO.name,
            epochs=self.epochs,
            profile_epochs=DEMO.profile_epochs or self.epochs,
            device=self.device.type,
        )
        return Bench(
            settings=settings,
            folder=self.folder / "runs" / f"{self.epochs}-epochs-{self.device.type}",
            methods=DEMO.methods,
            seeds=self.seeds,
            top_k=self.top_k,
            count_controls=False,
            workers=self.workers,
            tell=self.tell,
        )

    def run(self) -> Story:
        """Profile, train, time; what was found is in the folder too."""
        start, bench = time.perf_counter(), self.bench
        with one_thread():
            found = bench.run()
        story = Story(found, self.epochs, (time.perf_counter() - start) / 60)
        data = story.data()
        bench.save({**data, "seconds_per_step": found.seconds})
        found.cmap.save(self.folder / MAP_FILE)
        found.draw(self.folder)
        model = make_model(bench.problem, 0)
        save(load(run_folder(bench.folder, f"pcgrad + {story.surgery}", 0), model), self.folder / "branched")
        write_text(self.folder / RESULTS_FILE, json.dumps(json_values(data), indent=1) + "\n")
        return story


@dataclass(frozen=True)
class Story:
    """What was measured, as text and as plain values."""

    found: BenchRuns
    epochs: int
    minutes: float

    @property
    def surgery(self) -> str:
        """What the tables call Recon's plan."""
        return f"Recon K={self.found.top_k}"

    @property
    def layers(self) -> list[str]:
        """What Recon branched."""
        return list(next(v.plans[0].layers for v in self.found.variants if v.surgery == self.surgery))

    @property
    def comparison(self) -> Comparison:
        """The means over the seeds side by side, plain models first."""
        runs = self.found.runs
        surgeries = list(dict.fromkeys(of_seeds[0].surgery for of_seeds in runs.values()))
        labels = sorted(runs, key=lambda label: surgeries.index(runs[label][0].surgery))
        return compare({label: _mean_run(runs[label]) for label in labels}, seconds=self.found.seconds)

    @property
    def conflicts(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The share of conflicting steps by shared layer, in joint training without and with Recon."""
        before, after = self.found.before, self.found.after
        assert before is not None and after is not None
        return before.conflicts, after.conflicts

    def data(self) -> dict[str, Any]:
        """As plain values."""
        before, after = self.conflicts
        return {
            **self.comparison.as_dict(),
            "seeds": self._seeds,
            "epochs": self.epochs,
            "branched_layers": self.layers,
            "results_by_seed": {label: [run.results for run in runs] for label, runs in self.found.runs.items()},
            "conflicting_steps": {"before": before, "after": after},
            "profiled_steps": self.found.cmap.steps,
            "minutes": self.minutes,
        }

    def text(self, folder: Path) -> str:
        """As text; `folder` is where everything was saved."""
        return "\n".join(
            [
                f"{PROBLEM}: {self.epochs} epochs each, mean of {self._seeds} seed(s). Accuracies on the test pairs;",
                "Δm is against one model for each task; ms/step was measured for all in turn, on one thread.",
                "",
                self.comparison.text(),
                "",
                self._spread(),
                "",
                f"Recon branched {len(self.layers)} of {counted(len(self.found.cmap.layers), 'shared layer')}:",
                f"  {', '.join(self.layers)}",
                "",
                "Conflicting steps (cos < 0), in %, in the layers that stay shared, under joint training:",
                "",
                self._conflicts_table(),
                "",
                f"{self.minutes:.1f} minutes. Saved in {folder}: map.json, results.json, conflicts_by_layer.png,",
                f"conflicts_before_after.png, and branched/, the model of pcgrad + {self.surgery} with seed 0. Every",
                "run is in runs/, as `recon train` writes it.",
            ]
        )

    @property
    def _seeds(self) -> int:
        return len(next(iter(self.found.runs.values())))

    def _spread(self) -> str:
        """How far the seeds of one variant lie apart: differences in the table above that are noise."""
        if self._seeds == 1:
            return "One seed: differences of a few tenths of a point are noise. More seeds show how much."
        rows = self.found.comparison.rows
        widest = max(max(means) - min(means) for means in (row.mean_over(row.metrics) for row in rows))
        return f"Between its seeds, the mean accuracy of one row differs by up to {widest:.4f}."

    def _conflicts_table(self) -> str:
        before, after = self.conflicts
        kept = [name for name in before if name in after]
        rows = [[name, f"{100 * before[name]:.1f}", f"{100 * after[name]:.1f}"] for name in kept]
        if kept:
            means = (fmean(shares[name] for name in kept) for shares in (before, after))
            rows.append(["mean", *(f"{100 * mean:.1f}" for mean in means)])
        return text_table(["layer", "joint", self.found.branched], rows)


def _mean_run(runs: list[Run]) -> Run:
    tables = [run.results for run in runs]
    means = {t: {name: fmean(table[t][name] for table in tables) for name in of} for t, of in tables[0].items()}
    return replace(runs[0], results=means)
