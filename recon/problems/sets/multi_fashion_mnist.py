"""Multi-Fashion+MNIST: a handwritten digit and a piece of clothing on one canvas, one task for each."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from recon.errors import ProblemError
from recon.models import ResNet18
from recon.problems.files.idx import missing_files, read_split
from recon.problems.files.pareto_mtl import read_pickle
from recon.problems.files.roots import open_root, require_files
from recon.problems.loading import Splits, TensorBatches, loaders_of
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Problem, ReducedRun, Search, Task
from recon.problems.tasks.metrics import accuracy

DESCRIPTION = "a digit and a garment overlaid, 2 tasks, 36x36 pixels, ResNet-18; --data-root: MNIST and FashionMNIST"

NAME = "multi-fashion-mnist"
TASKS = ("digit", "fashion")
SOURCES = ("MNIST", "FashionMNIST")
PICKLE = "multi_fashion_and_mnist.pickle"
CLASSES = 10
CANVAS, IMAGE, SHIFT = 36, 28, 4  # in pixels: two sides, and how far an image may move towards the middle
BATCH = 256
# 135 steps of 256 images, half an hour of two cores for all: too few for the paper's stepped learning rate.
QUICK = ReducedRun(train_batches=45, test_batches=None, schedule="one-cycle")

Split = tuple[np.ndarray, np.ndarray]
"""Images or canvases `(N, H, W)`, uint8, and their labels."""

_EXPECTED = (
    "Expected are MNIST/raw and FashionMNIST/raw with four idx files each, gzipped or not, as "
    "torchvision.datasets.MNIST(DIR, download=True) and FashionMNIST(DIR, download=True) put them there (official "
    "sources: http://yann.lecun.com/exdb/mnist and https://github.com/zalandoresearch/fashion-mnist), or else the "
    f"{PICKLE} of https://github.com/Xi-L/ParetoMTL."
)


def multi_fashion_mnist(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """A digit of MNIST in the top left corner, an item of Fashion-MNIST in the bottom right one.

    The problem is Lin et al.'s ("Pareto Multi-Task Learning", NeurIPS 2019, section 6.1); network, optimizer and
    schedule are those with which Recon (Shi et al., ICLR 2023) trains on it: ResNet-18, SGD with momentum 0.9, batches
    of 256, a learning rate of 0.1 that falls to a tenth after a half and after three quarters of the training.

    Canvases are 36x36. Each 28x28 image is moved 0 to 4 pixels towards the middle, down and sideways independently;
    where the two overlap, their grey values add up and saturate. Every source image is used exactly twice: 120,000
    training canvases, 20,000 test canvases, from the training and the test images of both data sets. Which images
    meet and how far they move was never published for the original canvases. Here both are uniform, drawn once for
    all seeds; a seed shuffles the batches only. If `data_root` holds the original's `multi_fashion_and_mnist.pickle`,
    the problem uses its canvases instead.

    Inputs are `(N, 1, 36, 36)`, float32 from 0 to 1; targets are `(N,)` class indices.

    `data_root` holds `MNIST/raw` and `FashionMNIST/raw`, as torchvision lays them out, or the pickle. `train_samples`
    takes the first so many canvases only; they are in random order.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    _check_files(root)

    return Problem(
        name=NAME,
        tasks=[Task(name, F.cross_entropy, [accuracy(CLASSES)]) for name in TASKS],
        make_model=lambda: ResNet18(dict.fromkeys(TASKS, CLASSES)),
        make_loaders=loaders_of(lambda: _data(root, train_samples), BATCH, test_batch_size=1000),
        make_optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        make_scheduler=_scheduler,
        epochs=120,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(8, 1, CANVAS, CANVAS),
        search=Search(threshold=-0.1, top_k=25, epochs=40),
        quick=QUICK,
        cagrad_c=0.2,
    )


def _scheduler(optimizer: Optimizer, steps: int) -> MultiStepLR:
    # Rounded up: a milestone at step 0 would take effect before the first step.
    return MultiStepLR(optimizer, [math.ceil(steps / 2), math.ceil(3 * steps / 4)], gamma=0.1)


def _check_files(root: Path) -> None:
    if not (root / PICKLE).is_file():
        require_files(
            NAME, root, [path for source in SOURCES for path in missing_files(root / source / "raw")], _EXPECTED
        )


def _data(root: Path, train_samples: int | None) -> Splits:
    train, test = read_pickle(root / PICKLE, CANVAS, CLASSES) if (root / PICKLE).is_file() else _make(root)
    check_available(NAME, len(train[0]), train_samples)
    if train_samples is not None:
        canvases, labels = train
        train = canvases[:train_samples].copy(), labels[:train_samples].copy()  # the rest need not stay in memory
    return _batches(*train), _batches(*test)


def _batches(canvases: np.ndarray, labels: np.ndarray) -> TensorBatches:
    targets = {task: torch.from_numpy(labels[:, column]) for column, task in enumerate(TASKS)}
    return TensorBatches(torch.from_numpy(canvases)[:, None], targets, transform=_unit_interval)


def _unit_interval(grey: Tensor) -> Tensor:
    return grey.float() / 255


def _make(root: Path) -> tuple[Split, Split]:
    digits, items = (root / source / "raw" for source in SOURCES)
    train = _overlay(read_split(digits, "train"), read_split(items, "train"), seed=1)
    test = _overlay(read_split(digits, "test"), read_split(items, "test"), seed=2)
    return train, test


def _overlay(digits: Split, items: Split, seed: int) -> Split:
    """Canvases `(2 N, 36, 36)`, uint8, and labels `(2 N, 2)` from N images of either source and their labels."""
    _check_sources(digits, items)
    # RandomState, not default_rng: only its stream is frozen across numpy's versions (NEP 19), and conflict
    # maps made today should be comparable with those of next year.
    random = np.random.RandomState(seed)
    chosen = [_each_twice(len(images), random) for images, _ in (digits, items)]
    moves = [random.randint(SHIFT + 1, size=(2 * len(images), 2)) for images, _ in (digits, items)]
    canvases = np.zeros((len(chosen[0]), CANVAS, CANVAS), np.uint8)
    _add(canvases, digits[0][chosen[0]], moves[0])
    _add(canvases, items[0][chosen[1]], CANVAS - IMAGE - moves[1])
    labels = np.stack([digits[1][chosen[0]], items[1][chosen[1]]], axis=1)
    return canvases, labels.astype(np.int64)


def _each_twice(count: int, random: np.random.RandomState) -> np.ndarray:
    # One permutation after the other: the first samples hold as many different images as they can.
    return np.concatenate([random.permutation(count) for _ in range(2)])


def _add(canvases: np.ndarray, images: np.ndarray, corners: np.ndarray) -> None:
    """Add each image `(N, 28, 28)` to its canvas, its top left corner at a row and a column `(N, 2)`."""
    windows = np.lib.stride_tricks.sliding_window_view(canvases, (IMAGE, IMAGE), axis=(1, 2), writeable=True)
    places = np.arange(len(images)), corners[:, 0], corners[:, 1]
    there = windows[places]
    windows[places] = there + np.minimum(images, 255 - there)  # min(a + b, 255), without leaving uint8


def _check_sources(*splits: Split) -> None:
    for source, (images, labels) in zip(SOURCES, splits, strict=True):
        if images.shape[1:] != (IMAGE, IMAGE):
            raise ProblemError(f"{source} must have images of {IMAGE}x{IMAGE} pixels, but has {images.shape[1:]}.")
        if not len(labels) or labels.max() >= CLASSES:
            raise ProblemError(f"{source} must have labels from 0 to {CLASSES - 1}, but has {np.unique(labels)}.")
    counts = [len(images) for images, _ in splits]
    if counts[0] != counts[1]:
        raise ProblemError(f"{' and '.join(SOURCES)} must have equally many images, but have {counts}.")
