"""How long `recon bench` trains, and what: as the paper does, or a reduced run. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recon.experiments.recipe import Recipe

if TYPE_CHECKING:
    from recon.problems.problem import Problem


@dataclass(frozen=True)
class Preset:
    """The size of a run."""

    name: str
    methods: tuple[str, ...]  # each with and without Recon
    seeds: int
    epochs: int | None = None  # the problem's own if None
    profile_epochs: int | None = None  # those of the problem's own search if None, or else a quarter of the epochs
    train_batches: int | None = None  # at most so many of an epoch's; all if None
    test_batches: int | None = None  # at most so many; all if None
    count_every: int = 1  # count conflicts at each n-th step of the trainings
    rounds: int = 15  # how often each training step is timed
    recipe: Recipe = field(default_factory=Recipe)


def quick(problem: Problem) -> Preset:
    """A reduced run of the problem, of minutes on a CPU."""
    run = problem.quick
    return Preset(
        "quick",
        methods=("joint", "pcgrad"),
        seeds=1,
        epochs=run.epochs,
        profile_epochs=1,
        train_batches=run.train_batches,
        test_batches=run.test_batches,
        count_every=4,
        rounds=run.timing_rounds,
        recipe=Recipe(schedule=run.schedule),
    )


def paper(problem: Problem) -> Preset:
    """The run of the paper: all data, the problem's own epochs and schedule, three seeds (Shi et al. 2023, 5.1)."""
    cagrad = "cagrad" if problem.cagrad_c is None else f"cagrad:c={problem.cagrad_c:g}"
    return Preset("paper", ("joint", "mgda", "pcgrad", "graddrop", cagrad), 3)


PRESETS = {"quick": quick, "paper": paper}

DEMO = Preset("demo", ("joint", "pcgrad"), 2, epochs=6, profile_epochs=3)
"""The run of `recon demo`, on `digits`."""
