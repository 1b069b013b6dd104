"""How long `recon bench` trains, and what: as the paper does, or a reduced run. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recon.experiments.recipe import Recipe

if TYPE_CHECKING:
    from recon.problems.problem import Problem


@dataclass(frozen=True)
class Preset:
    """The size of a run.

    Args:
        name: of the preset.
        methods: gradient methods, each with and without Recon.
        seeds: how often everything is trained.
        epochs: of every training; the problem's own if None.
        profile_epochs: of the profile; the problem's own search's if None, or else a quarter of the epochs.
        train_batches: at most so many of an epoch's batches.
        test_batches: at most so many of the test batches.
        count_every: count conflicts at each n-th step of the trainings.
        rounds: how often each training step is timed.
        recipe: optimizer and schedule, where they are not the problem's own.
    """

    name: str
    methods: tuple[str, ...]
    seeds: int
    epochs: int | None = None
    profile_epochs: int | None = None
    train_batches: int | None = None
    test_batches: int | None = None
    count_every: int = 1
    rounds: int = 15
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
