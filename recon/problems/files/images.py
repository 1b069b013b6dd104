"""Read image files, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from recon.errors import ProblemError


def normalised(images: Tensor) -> Tensor:
    """Bytes `(..., 3, H, W)` as floats whose mean and deviation over ImageNet are 0 and 1 for each colour.

    Torchvision's ImageNet weights were trained with such images.
    """
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images.float() / 255 - mean) / std


def read_image(path: Path, mode: str | None = None) -> Image.Image:
    """An image, decoded, in Pillow's colour mode, such as "RGB", or with the file's own values if None.

    (torchvision.io would turn the label images of PASCAL VOC, which have palettes, into colours.)
    """
    try:
        with Image.open(path) as image:
            return image.copy() if mode is None else image.convert(mode)
    except Exception as error:  # a damaged file may raise anything, and one of 179 million pixels an error of Pillow's
        raise ProblemError(f"Cannot read the image {path}: {error}. Download or unpack it again.") from error
