"""RunFolder: saves one model and its record while it trains. Torch is imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recon import branching, training
from recon.experiments.run import Run
from recon.experiments.training.evaluations import Evaluations
from recon.support import launch
from recon.support.files.folders import replacing
from recon.support.tables import metric_text

if TYPE_CHECKING:
    from torch import nn

    from recon.problems.problem import Task
    from recon.support.network.forward import Batch

MODEL_FILES = ("run.json", "plan.json", "weights.safetensors")
CHECKPOINT_FILE = "training.checkpoint"
METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "weights.png"
BEST = "best"
"""The folder inside a run's that holds the model of its best epoch."""
RUN_FILES = (
    *MODEL_FILES,
    *(f"{BEST}/{name}" for name in MODEL_FILES),
    *(PICTURE_FILE, "conflicts.json", "cosines.json"),
)
"""What is removed when another model replaces a run's."""
RUN_MARKS = (*MODEL_FILES, CHECKPOINT_FILE, METRICS_FILE)
"""What the folder of a run has, even of one interrupted early."""


@dataclass
class RunFolder:
    """Saves and evaluates a model after every epoch.

    The folder has the last model, and in `best/` the best one, as `recon.load` takes them. A model and its record are
    replaced together, and an older run stays whole until this one's first epoch is done. Of several processes, the
    first one writes; all evaluate, since one that does not would wait for too long.
    """

    folder: Path  # the model's; made when there is something to save
    run: Run
    home: Path  # the run's, where the record lies: that of the model, or the one around it
    model: nn.Module
    tasks: Sequence[Task]  # those that the model is trained for
    test: Iterable[Batch]  # the batches to evaluate on
    evaluations: Evaluations  # when, and what is best
    tell: Callable[[str], None]  # is given a line of text after every epoch

    def end_epoch(self, epoch: training.Epoch) -> None:
        """Keep the epoch's model, and report it; the results go into the epoch's record."""
        self._note(epoch)
        if launch.number() == 0:
            self._keep_last(epoch.number)
        if self.evaluations.due(epoch.number, self.run.epochs):
            from recon.support.random_states import global_states_kept  # late: it imports torch

            # Evaluating must not change the random numbers that the training draws.
            with global_states_kept():
                epoch.results = training.evaluate(self.model, self.test, self.tasks, across_ranks=False)
            self._note(epoch)
            if launch.number() == 0:
                if self.evaluations.keep_best:
                    self._keep_best(epoch.number)
                self.run.save(self.home)
        alone = f"{self.tasks[0].name}: " if self.run.is_single_task else ""
        self.tell(f"{alone}{epoch_line(epoch, self.run.epochs)}")

    def finish(self, history: training.History) -> None:
        """Note the history that the training gave."""
        others = [record for record in self.run.history if not self._is_mine(record)]
        self.run.history = others + [asdict(epoch) for epoch in history.epochs]

    def _note(self, epoch: training.Epoch) -> None:
        """A resumed training may repeat an epoch."""
        earlier = [r for r in self.run.history if not self._is_mine(r) or r["number"] < epoch.number]
        self.run.history = [*earlier, asdict(epoch)]

    def _keep_last(self, number: int) -> None:
        # With its first epoch's model, this run takes the place of an older one.
        older = RUN_FILES if number == 1 else ()
        if self.run.is_single_task:
            with replacing(self.home, (*older, METRICS_FILE) if number == 1 else ()) as new:
                self.run.save(new)
        with replacing(self.folder, older) as new:
            if not self.run.is_single_task:
                self.run.save(new)
            branching.save(self.model, new)

    def _keep_best(self, number: int) -> None:
        mine = [record for record in self.run.history if self._is_mine(record)]
        best = self.evaluations.best(mine, self.run.higher_is_better)
        if best is None or best["number"] != number:
            return
        with replacing(self.folder / BEST, MODEL_FILES) as new:
            branching.save(self.model, new)
            if not self.run.is_single_task:
                replace(self.run, results=best["results"]).save(new)

    def _is_mine(self, record: dict[str, object]) -> bool:
        losses = record["losses"]
        return not self.run.is_single_task or (isinstance(losses, dict) and self.tasks[0].name in losses)


def epoch_line(epoch: training.Epoch, epochs: int) -> str:
    """The line for an epoch, one of `epochs`, when it is done."""
    losses = ", ".join(f"{task} {loss:.4f}" for task, loss in epoch.losses.items())
    results = ", ".join(
        f"{task} {name} {metric_text(value)}"
        for task, metrics in epoch.results.items()
        for name, value in metrics.items()
    )
    skipped = f", {epoch.skipped} skipped" if epoch.skipped else ""
    text = f"epoch {epoch.number}/{epochs}: loss {losses} ({epoch.steps} steps{skipped}, {epoch.seconds:.1f} s)"
    return f"{text}; test {results}" if results else text
