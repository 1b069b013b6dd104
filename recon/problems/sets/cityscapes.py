"""Cityscapes: semantic segmentation and inverse depth of streets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.optim import Adam

from recon.models import SegNet
from recon.problems.files import npy_folders
from recon.problems.files.roots import open_root, require_files
from recon.problems.loading import Splits, TensorBatches, loaders_of
from recon.problems.options import check_train_samples
from recon.problems.problem import Problem, ReducedRun, Search
from recon.problems.tasks import dense

DESCRIPTION = (
    "7-class segmentation and inverse depth of streets, 2 tasks, 128x256 pixels, SegNet; --data-root: Cityscapes"
)

NAME = "cityscapes"
CLASSES = 7
BATCH = 8
QUICK = ReducedRun(epochs=2, train_batches=20, test_batches=20, timing_rounds=3)  # a step needs seconds of a CPU
SIZE = (128, 256)
CHANNELS = {"segmentation": CLASSES, "inverse_depth": 1}
FIELDS = {"image": npy_folders.image, "label_7": npy_folders.labels(CLASSES), "depth": npy_folders.depth}

_EXPECTED = (
    "Expected are, in DIR/cityscapes or in DIR itself, the folders train and val with image, label_7 and depth in each "
    "and files 0.npy, 1.npy, ... in these, as preprocessed for https://github.com/lorenmt/mtan, or else the folders "
    "leftImg8bit, gtFine and disparity with train and val in each, as the archives leftImg8bit_trainvaltest.zip, "
    "gtFine_trainvaltest.zip and disparity_trainvaltest.zip of the official source https://www.cityscapes-dataset.com "
    "unpack."
)


def cityscapes(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """7-class segmentation and inverse depth of Cityscapes: 2,975 frames for training, 500 for testing.

    The data set is Cordts et al.'s (CVPR 2016), whose test labels are not published: its validation frames are the test
    set. The two tasks are Liu, Johns and Davison's (CVPR 2019): its seven categories of labels, and inverse depth, from
    the disparity, which is 0 far away, where depth itself has no upper bound. Network, optimizer and schedule are those
    with which Recon (Shi et al., ICLR 2023) trains on it: SegNet, Adam, batches of 8 images of 128x256, a learning rate
    of 5e-5 that falls to a half after half of the training. Images are not augmented, as in MTAN's paper.

    `data_root` holds the data set as preprocessed for MTAN, or as its official archives unpack. Of the latter, images,
    labels and disparities are resized when they are read, once per run; inverse depth then has the unit of the former
    (`recon.problems.files.cityscapes_files.read_frames`).

    Inputs are `(N, 3, H, W)`, float32 from 0 to 1; targets are class indices `(N, H, W)` with 255 for no class, and
    inverse depths `(N, 1, H, W)` with 0 for not known.

    `train_samples` takes only so many frames, always the same ones, spread over all.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    read = _layout(root)

    return Problem(
        name=NAME,
        tasks=[dense.segmentation("segmentation", CLASSES), dense.depth("inverse_depth")],
        make_model=lambda: SegNet(CHANNELS),
        make_loaders=loaders_of(lambda: read(train_samples), BATCH, BATCH),
        make_optimizer=lambda parameters: Adam(parameters, lr=5e-5),
        make_scheduler=dense.halved_at_half_time,
        epochs=200,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(BATCH, 3, *SIZE),
        search=Search(threshold=0.0, top_k=39, epochs=40),
        quick=QUICK,
        cagrad_c=0.2,
    )


def _layout(root: Path) -> Callable[[int | None], Splits]:
    """A function that reads `train_samples` samples and the test set of the layout there."""
    folder = root / "cityscapes" if (root / "cityscapes").is_dir() else root
    kinds = ("leftImg8bit", "gtFine", "disparity")
    if any((folder / kind).is_dir() for kind in kinds) and not (folder / "train").is_dir():
        require_files(NAME, folder, [f"{kind}/{split}" for kind in kinds for split in npy_folders.SPLITS], _EXPECTED)
        return lambda train_samples: _read_pictures(folder, train_samples)
    require_files(NAME, folder, npy_folders.folders(FIELDS), _EXPECTED)
    return lambda train_samples: _read_folders(folder, train_samples)


def _read_folders(folder: Path, train_samples: int | None) -> Splits:
    train, test = npy_folders.read_splits(NAME, folder, FIELDS, train_samples)
    return _batches(*train.values()), _batches(*test.values())


def _read_pictures(folder: Path, train_samples: int | None) -> Splits:
    from recon.problems.files.cityscapes_files import find_frames, read_frames  # late: it imports torchvision

    train, test = (find_frames(folder, split) for split in npy_folders.SPLITS)
    train = [train[index] for index in dense.chosen(NAME, len(train), train_samples)]
    return _batches(**read_frames(train, SIZE)), _batches(**read_frames(test, SIZE))


def _batches(image: np.ndarray, label: np.ndarray, depth: np.ndarray) -> TensorBatches:
    return dense.batches(image, {"segmentation": label, "inverse_depth": depth})
