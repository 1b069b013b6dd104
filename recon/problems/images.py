"""Image files, read with errors that name them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from recon.errors import ProblemError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue from 0 to 1: what torchvision's ImageNet weights were trained with."""


def read_image(path: Path, mode: str | None = None) -> Image.Image:
    """An image, decoded.

    Args:
        path: the file.
        mode: Pillow's name for the colours wanted, such as "RGB"; as in the file if None. (Label images of PASCAL VOC
            have palettes, which torchvision.io would make colours of.)

    Raises:
        ProblemError: the file is missing, damaged or no image.
    """
    try:
        with Image.open(path) as image:
            return image.copy() if mode is None else image.convert(mode)
    except (OSError, EOFError, SyntaxError, ValueError) as error:  # Pillow raises all four on damaged files
        raise ProblemError(f"Cannot read the image {path}: {error}. Download it again.") from error
