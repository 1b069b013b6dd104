"""BenchSettings: everything that a bench's runs must have in common. Imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from recon import problems
from recon.experiments.backbones import with_backbone
from recon.experiments.inputs import make_loaders
from recon.experiments.recipe import Recipe
from recon.problems.problem import Problem
from recon.support.loaders import LoaderOfLoaders, every_batch_once
from recon.support.network.forward import Batch


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One problem and how its runs are trained; plain values, which workers can be given.

    Args:
        problem_name: as `recon.problems.get` takes it.
        preset: the preset's name.
        epochs: of every training.
        profile_epochs: of the profile.
        device: where the models run.
        data_root: where its data are.
        train_samples: how many training samples to use; all if None.
        pretrained: weights to start from, of a problem that takes them.
        backbone: the network; the problem's own if empty.
        train_batches: at most so many of an epoch's batches.
        test_batches: at most so many of the test batches.
        count_every: count conflicts at each n-th step.
        threshold: S, of the profile and of what is counted.
        layers: the layers that the profile counts in, by regular expressions; see `recon.Profiler`.
        exclude: the layers that it leaves out.
        units: what it joins into one layer.
        recipe: optimizer and schedule.
    """

    problem_name: str
    preset: str
    epochs: int
    profile_epochs: int
    device: str
    data_root: Path | None = None
    train_samples: int | None = None
    pretrained: Path | None = None
    backbone: str = ""
    train_batches: int | None = None
    test_batches: int | None = None
    count_every: int = 1
    threshold: float = -0.1
    layers: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def problem(self) -> Problem:
        """The problem with this network and these batches."""
        return _problem(self)

    @property
    def steps(self) -> str:
        """How long a training is, for people."""
        most = "" if self.train_batches is None else f" of at most {self.train_batches} batches"
        return f"{self.epochs} epoch{'s' * (self.epochs > 1)}{most}"

    @property
    def choice(self) -> dict[str, tuple[str, ...]]:
        """The given ones of `layers`, `exclude` and `units`."""
        choice = {"layers": self.layers, "exclude": self.exclude, "units": self.units}
        return {name: patterns for name, patterns in choice.items() if patterns is not None}

    def as_dict(self) -> dict[str, Any]:
        """As options, without what changes no result: where the data are."""
        return {
            "PROBLEM": problems.home_of(self.problem_name),
            "--train-samples": self.train_samples,
            "--pretrained": None if self.pretrained is None else str(self.pretrained),
            "--backbone": self.backbone,
            "--preset": self.preset,
            "--epochs": self.epochs,
            "--profile-epochs": self.profile_epochs,
            "--train-batches": self.train_batches,
            "--test-batches": self.test_batches,
            "--threshold": self.threshold,
            **{f"--{name}": list(patterns) for name, patterns in self.choice.items()},
            "--device": self.device,
            "conflicts counted at one step in": self.count_every,
            **self.recipe.settings(),
        }


@cache  # a worker trains several models on the same data
def _problem(settings: BenchSettings) -> Problem:
    options = {name: getattr(settings, name) for name in ("data_root", "train_samples", "pretrained")}
    problem = with_backbone(problems.get(settings.problem_name, **options), settings.backbone)

    def first_of_loaders(seed: int) -> tuple[Iterable[Batch], Iterable[Batch]]:
        # Here, not around the first batches: what a wrapped loader holds would not move to a GPU.
        train, test = make_loaders(problem, seed, device_of(settings))
        return first_batches(train, settings.train_batches), first_batches(test, settings.test_batches)

    return replace(problem, make_loaders=first_of_loaders)


def first_batches(loader: Iterable[Batch], most: int | None) -> Iterable[Batch]:
    """The loader, of every pass the first `most` batches only; as it is for None."""
    if most is None:
        return loader
    return _CountedFirst(loader, most) if isinstance(loader, Sized) else _First(loader, most)


class _First(LoaderOfLoaders):
    def __init__(self, loader: Iterable[Batch], most: int) -> None:
        self.loader, self.most = loader, most

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.loader, self.most)

    def inner_loaders(self) -> Mapping[str, Iterable[Batch]]:
        return {"loader": self.loader}

    def once(self) -> Iterator[Batch]:
        return islice(every_batch_once(self.loader), self.most)


class _CountedFirst(_First):
    def __len__(self) -> int:
        assert isinstance(self.loader, Sized)
        return min(self.most, len(self.loader))


def fingerprint(path: Path) -> str:
    """A fingerprint of a map file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def device_of(settings: BenchSettings) -> torch.device:
    """Where the models run."""
    return torch.device(settings.device)
