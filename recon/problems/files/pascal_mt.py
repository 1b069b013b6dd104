"""PASCAL-Context with targets for five tasks, read as ASTMT's archive lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from recon.errors import ProblemError
from recon.problems.file_loading import Key
from recon.problems.files.images import normalised, read_image
from recon.problems.files.pascal_mat import read_human_parts, read_label_map
from recon.problems.tasks.dense import IGNORE

FOLDERS = ("JPEGImages", "semseg", "pascal-context/trainval", "human_parts", "normals_distill", "sal_distill")
SPLITS = {"train": "ImageSets/Context/train.txt", "test": "ImageSets/Context/val.txt"}
CLASSES = 21

# The normals come from a network that was trained on NYUv2's rooms, so they count only on what it knew: tvmonitor, and
# those of PASCAL-Context's 459 classes whose names are among NYUv2's 894.
_KNOWN_INDOORS = np.array(
    """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 73 78 83
    84 85 87 88 95 96 101 104 105 107 111 113 115 121 123 135 141 142 143 146 150 154 157 158 159 164 172 174 181 183
    184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255 260 261
    263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 313 314 319 323 329 330 331 336
    342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413 414 417 419 421
    423 427 429 430 432 440 441 442 443 444 446 454 457
    """.split(),
    dtype=int,
)

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image, normalised as ImageNet's, `(3, H, W)`, and its targets: `semseg` and `human_parts`, `(H, W)`, int64;
`saliency` and `edge`, 0 or 1, `(H, W)`, uint8; `normals`, unit vectors, `(3, H, W)`. Pixels that do not count in a task
have `IGNORE`, or zero for normals."""


class PascalMT(Dataset[Sample]):
    """The images of these names, padded on the right and below to `size` pixels; images of VOC have at most 500."""

    def __init__(self, folder: Path, names: Sequence[str], size: int) -> None:
        self.folder, self.names, self.size = folder, names, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Key) -> Sample:
        index, mirrored = key
        image, targets = read_sample(self.folder, self.names[index])
        if mirrored:
            image, targets = image.flip(-1), {task: target.flip(-1) for task, target in targets.items()}
            targets["normals"][0] *= -1  # their x points the other way too
        height, width = image.shape[1:]
        if max(height, width) > self.size:
            raise ProblemError(
                f"Image {self.names[index]} in {self.folder} has {height}x{width} pixels, but those of PASCAL VOC have "
                f"at most {self.size}x{self.size}. Unpack it again."
            )
        padding = (0, self.size - width, 0, self.size - height)
        return F.pad(image, padding), {
            task: F.pad(target, padding, value=0 if task == "normals" else IGNORE) for task, target in targets.items()
        }


def collate(samples: list[Sample]) -> Sample:
    """A batch of samples, without the tasks in which none of its pixels counts."""
    images, targets = default_collate(samples)
    return images, {
        task: target
        for task, target in targets.items()
        if (target.any() if task == "normals" else (target != IGNORE).any())
    }


def read_names(folder: Path, split: str) -> list[str]:
    """The names of a split's images."""
    path = folder / SPLITS[split]
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"Cannot read {path}: {error}. Unpack it again.") from error
    if not names:
        raise ProblemError(f"{path} must list the names of images, one on each line, but is empty. Unpack it again.")
    return names


def read_sample(folder: Path, name: str) -> Sample:
    """An image and its targets, in their own size."""
    image = np.asarray(read_image(folder / "JPEGImages" / f"{name}.jpg", "RGB"))
    classes = read_label_map(folder / "pascal-context" / "trainval" / f"{name}.mat")
    parts = read_human_parts(folder / "human_parts" / f"{name}.mat")
    targets = {
        "semseg": _semseg(folder / "semseg", name),
        "human_parts": np.full(image.shape[:2], IGNORE) if parts is None else parts.astype(np.int64),
        "saliency": (np.asarray(read_image(folder / "sal_distill" / f"{name}.png", "L")) > 127).astype(np.uint8),
        "normals": _normals(folder / "normals_distill" / f"{name}.png", classes),
        "edge": edges(classes),
    }
    for task, target in targets.items():
        if target.shape[:2] != image.shape[:2]:
            raise ProblemError(
                f"The {task} target of image {name} in {folder} has {_pixels(target)} pixels, but the image has "
                f"{_pixels(image)}. Unpack both again."
            )
    tensors = {task: _channels_first(target) for task, target in targets.items()}
    return normalised(_channels_first(image)), tensors


def edges(classes: np.ndarray) -> np.ndarray:
    """1 for pixels whose class differs from that of the pixel to their right or below, uint8.

    ASTMT marks the pixels on both sides and thins the lines to one pixel; this gives such lines directly.
    """
    edge = np.zeros(classes.shape, np.uint8)
    edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    edge[:-1] |= classes[:-1] != classes[1:]
    return edge


def _semseg(folder: Path, name: str) -> np.ndarray:
    """VOC's labels where they exist, else those that ASTMT took from PASCAL-Context."""
    voc = folder / "VOC12" / f"{name}.png"
    path = voc if voc.exists() else folder / "pascal-context" / f"{name}.png"
    labels = np.asarray(read_image(path), np.int64)
    if labels.ndim != 2 or not ((labels < CLASSES) | (labels == IGNORE)).all():
        raise ProblemError(f"{path} must hold labels from 0 to {CLASSES - 1}, or {IGNORE} for none. Unpack it again.")
    return labels


def _normals(path: Path, classes: np.ndarray) -> np.ndarray:
    """Unit vectors `(H, W, 3)`, float32; zero where they do not count."""
    normals = 2 * np.asarray(read_image(path, "RGB"), np.float32) / 255 - 1  # no byte stands for 0, so no vector is 0
    if normals.shape[:2] != classes.shape:
        return normals  # the caller raises an error that names the sizes
    return normals / np.linalg.norm(normals, axis=2, keepdims=True) * np.isin(classes, _KNOWN_INDOORS)[..., None]


def _pixels(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.moveaxis(array, 2, 0).copy() if array.ndim == 3 else array)
