"""How long `recon bench` trains, and what: as the paper does, or a reduced run. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recon_cli.recipe import Recipe

# CAGrad's c (alpha in Shi et al. 2023, appendix B) on each data set there.
_CAGRAD = {"multi-fashion-mnist": 0.2, "cityscapes": 0.2, "nyuv2": 0.4, "pascal-context": 0.1, "celeba": 0.1}


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


_QUICK = Preset("quick", ("joint", "pcgrad"), 1, 3, 1, train_batches=200, test_batches=100, count_every=4, rounds=4)
# A step takes a CPU seconds there.
_DENSE = replace(_QUICK, epochs=2, train_batches=20, test_batches=20, rounds=3)
_QUICK_FOR = {
    # 135 steps of 256 images, half an hour of two cores for all: too few for the paper's stepped learning rate.
    "multi-fashion-mnist": replace(_QUICK, train_batches=45, test_batches=None, recipe=Recipe(schedule="one-cycle")),
    **dict.fromkeys(("nyuv2", "cityscapes", "pascal-context", "celeba"), _DENSE),
}


def quick(problem: str) -> Preset:
    """A reduced run of the problem, of minutes on a CPU."""
    return _QUICK_FOR.get(problem, _QUICK)


def paper(problem: str) -> Preset:
    """The run of the paper: all data, the problem's own epochs and schedule, three seeds (Shi et al. 2023, 5.1)."""
    cagrad = f"cagrad:c={_CAGRAD[problem]:g}" if problem in _CAGRAD else "cagrad"
    return Preset("paper", ("joint", "mgda", "pcgrad", "graddrop", cagrad), 3)


PRESETS = {"quick": quick, "paper": paper}

DEMO = Preset("demo", ("joint", "pcgrad"), 2, epochs=6, profile_epochs=3)
"""The run of `recon demo`, on `digits`."""
