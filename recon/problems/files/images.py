"""Image files, read with errors that name them."""

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
    """An image, decoded.

    Args:
        path: the file.
        mode: Pillow's name for the colours wanted, such as "RGB"; as in the file if None. (Label images of PASCAL VOC
            have palettes, which torchvision.io would make colours of.)

    Raises:
        ProblemError: the file is missing, damaged or no image, or has more pixels than Pillow decodes (179 million).
    """
    try:
        with Image.open(path) as image:
            return image.copy() if mode is None else image.convert(mode)
    except Exception as error:  # Pillow lets a damaged file raise anything, and a bomb an error of its own
        raise ProblemError(f"Cannot read the image {path}: {error}. Download it again.") from error
