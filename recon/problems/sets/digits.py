"""Two overlaid handwritten digits: a problem that needs no download and trains on a CPU in a minute."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import CosineAnnealingLR

from recon.models import SmallResNet
from recon.problems.loading import Splits, TensorBatches, in_order, shuffled
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Problem, Task
from recon.problems.tasks.metrics import accuracy
from recon.support.network.forward import Batch

DESCRIPTION = "two overlaid handwritten digits, 2 tasks, 12x12 pixels, no download, a small ResNet"

NAME = "digits"
TASKS = ("top_left", "bottom_right")
CLASSES = 10
TRAIN_PAIRS, TEST_PAIRS = 20_000, 4_000
BATCH = 128
CANVAS, DIGIT, WHITE = 12, 8, 16.0  # sides in pixels; the data's largest grey value


def digits(train_samples: int | None = None) -> Problem:
    """Two overlaid digits, one task for each.

    MultiMNIST's idea (Sabour et al., "Dynamic Routing Between Capsules", NeurIPS 2017, section 6; as a
    two-task problem in Sener and Koltun, NeurIPS 2018) on the 1,797 real digits that come with scikit-learn
    (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits"). One digit lies in the top left
    corner of a 12x12 canvas, the other in the bottom right corner; where they overlap, their ink adds up and
    saturates.

    Inputs are `(N, 1, 12, 12)`, float32 with mean 0 and variance 1; targets are `(N,)` class indices. No
    digit is in both a training and a test pair. The data are the same for every seed, which only shuffles the
    batches.

    `train_samples` takes the first so many pairs only; they are in random order.
    """
    check_train_samples(NAME, train_samples, BATCH)
    check_available(NAME, TRAIN_PAIRS, train_samples)
    return Problem(
        name=NAME,
        tasks=[Task(name, F.cross_entropy, [accuracy(CLASSES)]) for name in TASKS],
        make_model=lambda: SmallResNet(dict.fromkeys(TASKS, CLASSES)),
        make_loaders=partial(_loaders, train_samples=train_samples),
        make_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        # At a constant rate, one epoch's accuracy can lie points away from the next one's.
        make_scheduler=CosineAnnealingLR,
        epochs=6,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(8, 1, CANVAS, CANVAS),
    )


def _loaders(seed: int, train_samples: int | None) -> tuple[Iterable[Batch], Iterable[Batch]]:
    train, test = _data()
    if train_samples is not None:
        train = TensorBatches(*train[list(range(train_samples))])
    return shuffled(train, BATCH, seed), in_order(test, 1000)


def _data() -> Splits:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, DIGIT, DIGIT), labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    train_canvases, train_targets = _overlay(train_images, train_labels, TRAIN_PAIRS, seed=1)
    test_canvases, test_targets = _overlay(test_images, test_labels, TEST_PAIRS, seed=2)
    mean, std = train_canvases.mean(), train_canvases.std()
    return (
        TensorBatches((train_canvases - mean) / std, train_targets),
        TensorBatches((test_canvases - mean) / std, test_targets),
    )


def _overlay(
    images: np.ndarray, labels: np.ndarray, pairs: int, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # RandomState, not default_rng: only its stream is frozen across numpy's versions (NEP 19), and conflict
    # maps made today should be comparable with those of next year.
    first, second = np.random.RandomState(seed).randint(len(images), size=(2, pairs))
    canvases = np.zeros((pairs, 1, CANVAS, CANVAS), dtype=np.float32)
    canvases[:, 0, :DIGIT, :DIGIT] = images[first]
    canvases[:, 0, -DIGIT:, -DIGIT:] += images[second]
    targets = (torch.from_numpy(labels[chosen]) for chosen in (first, second))
    return torch.from_numpy(canvases.clip(max=WHITE)), dict(zip(TASKS, targets, strict=True))
