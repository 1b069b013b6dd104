"""CelebA: forty attributes of a face, one task for each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

from recon.models import ResNet18
from recon.models.pretrained import load_pretrained
from recon.problems.files.celeba_files import ATTRIBUTES, IMAGES, LABELS, PARTITION, SIDE, read_images, read_labels
from recon.problems.files.images import normalised
from recon.problems.files.roots import open_root, require_files
from recon.problems.loading import Splits, TensorBatches, loaders_of
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Metric, Problem, ReducedRun, Search, Task

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch
    from torchmetrics import Metric as MetricState

DESCRIPTION = "attributes of a face, 40 tasks, 64x64 pixels, ResNet-18; --data-root: torchvision's CelebA"

NAME = "celeba"
FOLDER = "celeba"
BATCH = 256
EPOCHS = 5
QUICK = ReducedRun(epochs=2, train_batches=20, test_batches=20, timing_rounds=3)  # a step needs seconds of a CPU

_EXPECTED = (
    f"Expected are {FOLDER}/{IMAGES}/*.jpg, {FOLDER}/{LABELS} and {FOLDER}/{PARTITION}, as "
    "torchvision.datasets.CelebA(DIR, download=True) puts them there (official source: "
    "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)."
)


def celeba(
    data_root: str | Path | None = None, train_samples: int | None = None, pretrained: str | Path | None = None
) -> Problem:
    """Forty yes-or-no attributes of 202,599 faces (Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015).

    As a problem of forty tasks it is Sener and Koltun's ("Multi-Task Learning as Multi-Objective Optimization",
    NeurIPS 2018, section 5.2): images of 64x64 pixels, a ResNet-18 whose pooled features go straight to a two-way
    classifier for each attribute, and the error averaged over the attributes. Optimizer and schedule are those of Recon
    (Shi et al., ICLR 2023): Adam at 5e-5, five epochs, half the rate from the fourth on. The batches of 256 and the
    five epochs of profiling are this library's choice.

    Inputs are `(N, 3, 64, 64)`, float32, normalised as ImageNet's; targets are `(N,)`, 1 for yes. The training set is
    the 162,770 images of the training partition, the test set the 19,962 of the test partition. A seed shuffles the
    batches.

    `data_root` holds `celeba`, as torchvision lays it out; `train_samples` takes the first so many images only;
    `pretrained` is a file of torchvision's ResNet-18 weights, from which all but the heads start.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    require_files(NAME, root, [f"{FOLDER}/{name}" for name in (IMAGES, LABELS, PARTITION)], _EXPECTED)

    def make_model() -> ResNet18:
        model = ResNet18(dict.fromkeys(ATTRIBUTES, 2), in_channels=3, features=None)
        if pretrained is not None:
            load_pretrained(model, pretrained, "resnet18", unused=("fc.",), fresh=("heads.",))
        return model

    return Problem(
        name=NAME,
        tasks=[Task(name, F.cross_entropy, [Metric("error", _error, higher_is_better=False)]) for name in ATTRIBUTES],
        make_model=make_model,
        make_loaders=loaders_of(lambda: _data(root / FOLDER, train_samples), BATCH, test_batch_size=1000),
        make_optimizer=lambda parameters: Adam(parameters, lr=5e-5),
        make_scheduler=lambda optimizer, steps: MultiStepLR(optimizer, [math.ceil(steps * 3 / EPOCHS)], gamma=0.5),
        epochs=EPOCHS,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(8, 3, SIDE, SIDE),
        search=Search(threshold=-0.05, top_k=25, epochs=5),
        quick=QUICK,
        cagrad_c=0.1,
    )


def _error() -> MetricState:
    from torchmetrics.classification import MulticlassAccuracy

    return 1 - MulticlassAccuracy(2, average="micro")


def _data(folder: Path, train_samples: int | None) -> Splits:
    labels = read_labels(folder)
    check_available(NAME, len(labels["train"][0]), train_samples)
    return _split(folder, "train", *labels["train"], train_samples), _split(folder, "test", *labels["test"], None)


def _split(folder: Path, split: str, names: list[str], labels: np.ndarray, limit: int | None) -> TensorBatches:
    count = len(names) if limit is None else limit
    images = torch.from_numpy(read_images(folder, split, names, count))
    columns = torch.from_numpy(labels[:count]).T.contiguous()
    return TensorBatches(images, dict(zip(ATTRIBUTES, columns, strict=True)), transform=normalised)
