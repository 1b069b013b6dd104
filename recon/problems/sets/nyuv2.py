"""NYUv2: semantic segmentation, depth and surface normals of rooms."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.optim import Adam

from recon.errors import ProblemError
from recon.models import MTAN
from recon.problems.files import npy_folders
from recon.problems.files.roots import open_root, require_files
from recon.problems.files.surface_normals import normals_from_depth
from recon.problems.loading import Splits, TensorBatches, loaders_of
from recon.problems.options import check_train_samples
from recon.problems.problem import Problem, ReducedRun, Search
from recon.problems.tasks import dense

DESCRIPTION = (
    "13-class segmentation, depth and normals of rooms, 3 tasks, MTAN; --data-root: NYUv2, as MTAN's folders or packed "
    "(normals then derived from depth)"
)

NAME = "nyuv2"
CLASSES = 13
BATCH = 2
QUICK = ReducedRun(epochs=2, train_batches=20, test_batches=20, timing_rounds=3)  # a step needs seconds of a CPU
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


def nyuv2(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """13-class segmentation, depth and surface normals of NYUv2's labelled frames: 795 for training, 654 for testing.

    The data set is Silberman et al.'s ("Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012), the
    three tasks Liu, Johns and Davison's (CVPR 2019); network, optimizer and schedule are those with which Recon (Shi et
    al., ICLR 2023) trains on it: MTAN, Adam, batches of 2, a learning rate of 1e-4 that falls to a half after half of
    the training. Images are not augmented, as in MTAN's paper.

    `data_root` holds one of two things:

    - The data set as preprocessed for MTAN, at 288x384 pixels, with the normals of Eigen and Fergus (ICCV 2015).
    - A packed file, at 96x128 pixels, without normals. They are then DERIVED FROM ITS DEPTH and the camera's
      intrinsics (`recon.problems.files.surface_normals`), so that depth and normals differ less as tasks there. Do not
      compare the angles with published ones.

    Inputs are `(N, 3, H, W)`, float32 from 0 to 1; targets are class indices `(N, H, W)` with 255 for no class, depths
    in metres `(N, 1, H, W)` with 0 for not known, and unit vectors `(N, 3, H, W)` with 0 for not known.

    `train_samples` takes only so many frames, always the same ones, spread over all.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    read, size = _layout(root)

    return Problem(
        name=NAME,
        tasks=[dense.segmentation("segmentation", CLASSES), dense.depth("depth"), dense.normals("normals")],
        make_model=lambda: MTAN(CHANNELS),
        make_loaders=loaders_of(lambda: read(train_samples), BATCH, BATCH),
        make_optimizer=lambda parameters: Adam(parameters, lr=1e-4),
        make_scheduler=dense.halved_at_half_time,
        epochs=200,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(BATCH, 3, *size),
        search=Search(threshold=-0.02, top_k=22, epochs=50),
        quick=QUICK,
        cagrad_c=0.4,
    )


def _layout(root: Path) -> tuple[Callable[[int | None], Splits], tuple[int, int]]:
    """A function that reads `train_samples` samples and the test set of the layout there; the frames' size."""
    folder = root / "nyuv2" if (root / "nyuv2").is_dir() else root
    if (folder / PACKED).is_file() and not (folder / "train").is_dir():
        return lambda train_samples: _read_packed(folder / PACKED, train_samples), (96, 128)
    require_files(NAME, folder, npy_folders.folders(FIELDS), _EXPECTED)
    return lambda train_samples: _read_folders(folder, train_samples), (288, 384)


def _read_folders(folder: Path, train_samples: int | None) -> Splits:
    train, test = npy_folders.read_splits(NAME, folder, FIELDS, train_samples)
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
    # Compressed arrays may be a thousand times as large in memory as on the disk.
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > _MOST_BYTES:
        raise ValueError(f"unpacked, it has {size} bytes, but must have at most {_MOST_BYTES}")


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
        ((indices < 0).any() or (indices >= len(image)).any(), "train and test must be numbers of frames in image"),
    ):
        if wrong:
            raise ProblemError(f"{path} does not hold what it should: {expected}.")
