"""NYUv2: semantic segmentation, depth and surface normals of rooms."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.optim import Adam

from recon.batches import Batch
from recon.errors import ProblemError
from recon.models import MTAN
from recon.problem import Problem, Search
from recon.problems import dense, descriptions, npy_folders
from recon.problems.loading import TensorBatches, in_order, shuffled
from recon.problems.roots import open_root, require_files
from recon.problems.subsets import check_train_samples
from recon.problems.surface_normals import normals_from_depth

NAME = "nyuv2"
CLASSES = 13
BATCH = 2
CHANNELS = {"segmentation": CLASSES, "depth": 1, "normals": 3}
PACKED = "nyuv2_96x128.npz"
_MOST_BYTES = 2**31  # unpacked; its 1,449 frames take 140 MB
FIELDS = {
    "image": npy_folders.image,
    "label": npy_folders.labels(CLASSES),
    "depth": npy_folders.depth,
    "normal": npy_folders.normals,
}
# Of the colour camera, at 640x480 pixels, from NYUv2's toolbox; its principal point counts pixels from 1.
FOCAL, CENTRE, CAMERA_SIZE = (518.8579, 519.4696), (325.5824 - 0.5, 253.7362 - 0.5), (640, 480)

_EXPECTED = (
    "Expected are, in DIR/nyuv2 or in DIR itself, the folders train and val with image, label, depth and normal in "
    "each and files 0.npy, 1.npy, ... in these, as preprocessed for https://github.com/lorenmt/mtan, or else a packed "
    f"{PACKED} with the arrays image, depth_m, seg13, train and test. The official source of the data is "
    "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html."
)

Splits = tuple[TensorBatches, TensorBatches]


def nyuv2(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """13-class segmentation, depth and surface normals of NYUv2's labelled frames: 795 for training, 654 for testing.

    The data set is Silberman et al.'s ("Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012), the
    three tasks Liu, Johns and Davison's (CVPR 2019); network, optimizer and schedule are those with which Recon (Shi et
    al., ICLR 2023) trains on it: MTAN, Adam, batches of 2, a learning rate of 1e-4 that falls to a half after half of
    the training. Images are not augmented, as in MTAN's paper.

    `data_root` holds one of two things:

    - The data set as preprocessed for MTAN, at 288x384 pixels, with the normals of Eigen and Fergus (ICCV 2015).
    - A packed file, at 96x128 pixels, without normals. They are then DERIVED FROM ITS DEPTH and the camera's
      intrinsics (`recon.problems.surface_normals`), so that depth and normals are less different tasks there, and
      angles compare with no published ones.

    Inputs are `(N, 3, H, W)`, float32 from 0 to 1; targets are class indices `(N, H, W)` with 255 for no class, depths
    in metres `(N, 1, H, W)` with 0 for not known, and unit vectors `(N, 3, H, W)` with 0 for not known.

    Args:
        data_root: the folder that holds `nyuv2`, or that folder.
        train_samples: train on so many frames only, always the same ones, spread over all. All if not given.

    Raises:
        UsageError: `data_root` is not given, or `train_samples` is below a batch or above what there is (the latter
            when the data are read).
        ProblemError: files are missing or, when they are read, damaged.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    read, size = _layout(root)
    data = cache(lambda: read(train_samples))  # a run asks for loaders several times

    def make_loaders(seed: int) -> tuple[Iterable[Batch], Iterable[Batch]]:
        train, test = data()
        return shuffled(train, BATCH, seed), in_order(test, BATCH)

    return Problem(
        name=NAME,
        tasks=[dense.segmentation("segmentation", CLASSES), dense.depth("depth"), dense.normals("normals")],
        make_model=lambda: MTAN(CHANNELS),
        make_loaders=make_loaders,
        make_optimizer=lambda parameters: Adam(parameters, lr=1e-4),
        make_scheduler=dense.halved_at_half_time,
        epochs=200,
        description=descriptions()[NAME],
        example_inputs=lambda: torch.zeros(BATCH, 3, *size),
        search=Search(threshold=-0.02, top_k=22, epochs=50),
    )


def _layout(root: Path) -> tuple[Callable[[int | None], Splits], tuple[int, int]]:
    """What reads the data there, and their height and width."""
    folder = root / "nyuv2" if (root / "nyuv2").is_dir() else root
    if (folder / PACKED).is_file() and not (folder / "train").is_dir():
        return lambda train_samples: _read_packed(folder / PACKED, train_samples), (96, 128)
    require_files(NAME, folder, [f"{split}/{field}" for split in ("train", "val") for field in FIELDS], _EXPECTED)
    return lambda train_samples: _read_folders(folder, train_samples), (288, 384)


def _read_folders(folder: Path, train_samples: int | None) -> Splits:
    counts = [npy_folders.count_frames(folder / split, FIELDS) for split in ("train", "val")]
    train = npy_folders.read_frames(folder / "train", FIELDS, dense.chosen(NAME, counts[0], train_samples))
    test = npy_folders.read_frames(folder / "val", FIELDS, np.arange(counts[1]))
    return _batches(**train), _batches(**test)


def _batches(image: np.ndarray, label: np.ndarray, depth: np.ndarray, normal: np.ndarray) -> TensorBatches:
    return dense.batches(image, {"segmentation": label, "depth": depth, "normals": normal})


def _read_packed(path: Path, train_samples: int | None) -> Splits:
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("image", "depth_m", "seg13", "train", "test")}
    except Exception as error:  # numpy and zipfile let a damaged archive raise nearly anything
        raise ProblemError(f"Cannot read {path}: {error}. {_EXPECTED}") from error
    _check_packed(path, **arrays)
    train = arrays["train"][dense.chosen(NAME, len(arrays["train"]), train_samples)]
    return _unpack(arrays, train), _unpack(arrays, arrays["test"])


def _check_size(path: Path) -> None:
    """Compressed arrays may be a thousand times as large in memory as on the disk."""
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > _MOST_BYTES:
        raise ValueError(f"unpacked, it has {size} bytes, but {_MOST_BYTES} at most are read")


def _unpack(arrays: dict[str, np.ndarray], indices: np.ndarray) -> TensorBatches:
    depth = arrays["depth_m"][indices]
    depth[~np.isfinite(depth)] = 0
    scale = [size / full for size, full in zip(depth.shape[:0:-1], CAMERA_SIZE, strict=True)]
    focal, centre = ((x * scale[0], y * scale[1]) for x, y in (FOCAL, CENTRE))
    images = np.ascontiguousarray(np.moveaxis(arrays["image"][indices], -1, 1))
    return _batches(images, arrays["seg13"][indices], depth[:, None], normals_from_depth(depth, focal, centre))


def _check_packed(
    path: Path, image: np.ndarray, depth_m: np.ndarray, seg13: np.ndarray, train: np.ndarray, test: np.ndarray
) -> None:
    frames = image.shape[:3]
    indices = np.concatenate([train, test])
    for wrong, expected in (
        (image.dtype != np.uint8 or image.shape != (*frames, 3), "image must be (N, H, W, 3) bytes"),
        (depth_m.dtype.kind != "f" or depth_m.shape != frames, "depth_m must be (N, H, W) metres"),
        (seg13.dtype != np.uint8 or seg13.shape != frames, "seg13 must be (N, H, W) bytes"),
        (((seg13 >= CLASSES) & (seg13 != dense.IGNORE)).any(), f"seg13 must have classes below {CLASSES}, or 255"),
        (indices.dtype.kind not in "iu" or not len(test), "train and test must be lists of frames"),
        ((indices < 0).any() or (indices >= len(image)).any(), "train and test must name frames that are there"),
    ):
        if wrong:
            raise ProblemError(f"{path} holds something else than expected: {expected}.")
