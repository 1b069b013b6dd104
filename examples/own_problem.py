"""A problem of your own: one function that returns a `recon.Problem`.

Try it from the folder above:

    recon profile examples/own_problem.py:problem --epochs 1 --out map.json

The data are the 1,797 handwritten digits of scikit-learn, 8x8 pixels. One network answers two questions about
each: which digit it is (10 classes), and how slanted the writing is (a number).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from recon import Metric, Problem, Task


class DigitNet(nn.Module):
    """Any module works, as long as it returns one output for each task, under the task's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(32)
        self.digit_head = nn.Linear(32 * 4 * 4, 10)
        self.slant_head = nn.Linear(32 * 4 * 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, 1, 8, 8)` to `{"digit": (N, 10) logits, "slant": (N,)}`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x))).flatten(1)
        return {"digit": self.digit_head(x), "slant": self.slant_head(x).squeeze(1)}


class SlantedDigits(Dataset):
    """The usual data set; a sample is `(input, {task name: target})`."""

    def __init__(self) -> None:
        images, self.labels = load_digits(return_X_y=True)
        self.images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image = self.images[index]
        return image, {"digit": self.labels[index], "slant": slant(image[0])}


def slant(image: np.ndarray) -> np.float32:
    """How far the strokes lean, in pixels to the side per pixel of height (a ratio of second moments)."""
    rows, columns = np.indices(image.shape)
    rows = rows - np.average(rows, weights=image)
    columns = columns - np.average(columns, weights=image)
    return np.float32((image * rows * columns).sum() / (image * rows**2).sum())


def make_loaders(seed: int) -> tuple[DataLoader, DataLoader]:
    """The seed decides the order of the training batches, not what is trained and tested on."""
    train, test = random_split(SlantedDigits(), [0.8, 0.2], torch.Generator().manual_seed(0))
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(train, batch_size=64, shuffle=True, generator=shuffle), DataLoader(test, batch_size=256)


def problem() -> Problem:
    """What `recon profile examples/own_problem.py:problem` calls."""
    # torchmetrics has most metrics; say which way they improve. A task without any reports its loss.
    accuracy = Metric("accuracy", lambda: MulticlassAccuracy(10, average="micro"))
    error = Metric("mean absolute error", MeanAbsoluteError, higher_is_better=False)
    return Problem(
        name="slanted_digits",
        tasks=[Task("digit", F.cross_entropy, [accuracy]), Task("slant", F.mse_loss, [error])],
        make_model=DigitNet,
        make_loaders=make_loaders,
        make_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        epochs=5,
    )
