"""Reading Cityscapes as its official archives unpack, which is the layout that torchvision reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Cityscapes

from recon.errors import ProblemError, shortened
from recon.problems.files.images import read_image
from recon.problems.tasks.dense import IGNORE

KINDS = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds", "disparity": "disparity"}
"""`{folder: how its files' names end}`."""

Frame = tuple[np.ndarray, np.ndarray, np.ndarray]


def find_frames(root: Path, split: str) -> list[list[Path]]:
    """The three files of each frame: image, labels, disparity."""
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    stems = [(path.parent.name, path.name.removesuffix("leftImg8bit.png")) for path in images]
    frames = [
        [root / kind / split / city / f"{stem}{ending}.png" for kind, ending in KINDS.items()] for city, stem in stems
    ]
    missing = [str(path.relative_to(root)) for frame in frames for path in frame if not path.is_file()]
    if missing or not frames:
        raise ProblemError(
            f"{root} lacks {shortened(missing) or f'all images of leftImg8bit/{split}/CITY/*_leftImg8bit.png'}. Each "
            "image needs its labels and its disparity: unpack leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip "
            "and disparity_trainvaltest.zip of https://www.cityscapes-dataset.com there."
        )
    return frames


def read_frames(frames: list[list[Path]], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Frames resized to (height, width): `image` (N, 3, H, W), `label` (N, H, W), `depth` (N, 1, H, W), half floats.

    Images are bytes. Labels are 0 to 6 for flat, construction, object, nature, sky, human and vehicle, `IGNORE` for the
    rest. A file's disparity p stands for d = (p - 1) / 256 pixels, and p = 0 for none (Cityscapes' README). Inverse
    depth is proportional to d, and given as d / 256, which is within 2e-5 the unit of the data preprocessed for MTAN; 0
    where it is not known. An inverse depth of 1 is 0.54 / m (256 pixels over the camera's baseline of 0.209 m and focal
    length of 2263 pixels).
    """
    kept: dict[str, np.ndarray] = {
        "image": np.empty((len(frames), 3, *size), np.uint8),
        "label": np.empty((len(frames), *size), np.uint8),
        "depth": np.empty((len(frames), 1, *size), np.float16),
    }
    # Threads: almost all of the time goes into decoding, and Pillow lets several threads decode at once.
    with ThreadPoolExecutor() as threads:
        for row, frame in enumerate(threads.map(lambda paths: _read(paths, size), frames)):
            kept["image"][row], kept["label"][row], kept["depth"][row, 0] = frame
    return kept


def _read(paths: list[Path], size: tuple[int, int]) -> Frame:
    image = read_image(paths[0], "RGB")
    labels, disparity = (np.asarray(read_image(path)) for path in paths[1:])
    for path, array, dtypes in ((paths[1], labels, ("u1",)), (paths[2], disparity, ("u2", "i4"))):
        if array.shape != image.size[::-1] or array.dtype.str[1:] not in dtypes:
            raise ProblemError(
                f"{path} must be a grey image of {8 if dtypes[0] == 'u1' else 16} bits and {image.size[0]}x"
                f"{image.size[1]} pixels, like its photograph, but holds {array.dtype} values of shape {array.shape}."
            )
    rows, columns = (
        ((np.arange(few) + 0.5) * many / few).astype(int) for few, many in zip(size, labels.shape, strict=True)
    )
    nearest = np.ix_(rows, columns)
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    inverse_depth = np.maximum(disparity[nearest].astype(np.float32) - 1, 0) / 256**2
    return np.moveaxis(pixels, -1, 0), _categories()[labels[nearest]], inverse_depth.astype(np.float16)


def _categories() -> np.ndarray:
    """The category of each label, from 0; Cityscapes' first category, void, is `IGNORE`."""
    table = np.full(256, IGNORE, np.uint8)
    for label in Cityscapes.classes:
        if label.id >= 0 and label.category_id > 0:
            table[label.id] = label.category_id - 1
    return table
