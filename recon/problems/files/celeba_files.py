"""CelebA's files, read from where torchvision keeps them.

torchvision.datasets.CelebA itself decodes one image at a time, and refuses lists without the original's checksums.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from recon.errors import ProblemError, UsageError, WriteError
from recon.problems.files.images import read_image
from recon.support.files.whole import write_atomically

logger = logging.getLogger(__name__)

ATTRIBUTES = tuple(
    """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
    Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
    Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young
    """.split()
)
IMAGES, LABELS, PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
SPLITS = {"train": 0, "valid": 1, "test": 2}
SIDE = 64
_CHUNK = 1024


def read_labels(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """`{split: (names of the image files, labels (N, 40) of 0 and 1, int64)}`, from the lists in the folder."""
    names, labels = _read_attributes(folder / LABELS)
    try:
        listed = np.loadtxt(folder / PARTITION, dtype=str, ndmin=2)
        images, partition = listed[:, 0], listed[:, 1].astype(int)
    except (OSError, ValueError, IndexError) as error:
        raise ProblemError(f"Cannot read {folder / PARTITION}: {error}. Download it again.") from error
    if not np.array_equal(images, names):
        raise ProblemError(
            f"{LABELS} and {PARTITION} in {folder} must list the same images in the same order, but have "
            f"{len(names)} and {len(images)}. Download both again."
        )
    return {
        split: (names[partition == number].tolist(), labels[partition == number]) for split, number in SPLITS.items()
    }


def _read_attributes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open(encoding="utf-8") as file:
            count, attributes = int(file.readline()), tuple(file.readline().split())
        names = np.loadtxt(path, dtype=str, skiprows=2, usecols=0, ndmin=1)
        signs = np.loadtxt(path, dtype=np.int8, skiprows=2, usecols=range(1, 1 + len(attributes)), ndmin=2)
    except (OSError, ValueError) as error:
        raise ProblemError(f"Cannot read {path}: {error}. Download it again.") from error
    if attributes != ATTRIBUTES:
        raise ProblemError(f"{path} must list CelebA's 40 attributes in its second line, but lists {attributes}.")
    if len(names) != count or not np.isin(signs, (-1, 1)).all():
        raise ProblemError(
            f"{path} must hold {count} images, as its first line says, with 1 or -1 for each attribute, but holds "
            f"{len(names)}, with {np.unique(signs)}. Download it again."
        )
    return names, (signs > 0).astype(np.int64)


def read_images(folder: Path, split: str, names: Sequence[str], count: int) -> np.ndarray:
    """The first `count` of a split's images, `(count, 3, 64, 64)`, uint8, resized.

    A whole split is decoded once and kept in one file beside the lists (2 GB for the training images); batches are then
    read from it when needed. If no file can be written, and for a part of a split, the images stay in memory.
    """
    path = folder / f"recon-{split}-{SIDE}x{SIDE}.npy"
    paths = [folder / IMAGES / name for name in names]
    kept = _kept(path, len(names))
    if kept is None and count == len(names) and os.access(folder, os.W_OK):
        kept = _keep(path, paths)
    return np.concatenate(list(_decoded(paths[:count]))) if kept is None else kept[:count]


def _kept(path: Path, count: int) -> np.ndarray | None:
    """The split's file, mapped into memory; None if there is none, or if it holds other images."""
    try:
        # Copy on write: torch has no read-only tensors.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    if not isinstance(images, np.ndarray):  # an archive of arrays
        return None
    return images if images.shape == (count, 3, SIDE, SIDE) and images.dtype == np.uint8 else None


def _keep(path: Path, paths: Sequence[Path]) -> np.ndarray | None:
    logger.info("Decoding %d images into %s; later runs read them from there.", len(paths), path)

    def write(temporary: Path) -> None:
        shape = (len(paths), 3, SIDE, SIDE)
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images in _decoded(paths):
                file.write(images.tobytes())

    try:
        write_atomically(path, write)
    except ProblemError:  # of an image
        raise
    except (UsageError, WriteError) as error:
        logger.warning("%s The images stay in memory, and the next run will decode them again.", error)
    return _kept(path, len(paths))


def _decoded(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Chunks of images `(n, 3, 64, 64)`, decoded by a thread for each processor: Pillow lets them run together."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(paths), _CHUNK):
            yield np.stack(list(threads.map(_read_small, paths[start : start + _CHUNK])))


def _read_small(path: Path) -> np.ndarray:
    image = read_image(path, "RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)
