"""Torchvision's vision transformer with a linear head for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models import VisionTransformer

from recon.errors import UsageError


class TaskHeads(nn.ModuleDict):
    """A linear head for each task, where torchvision has one."""

    def __init__(self, tasks: Mapping[str, int], features: int) -> None:
        super().__init__({task: nn.Linear(features, classes) for task, classes in tasks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features `(N, features)` to logits `{task: (N, classes)}`."""
        return {task: head(x) for task, head in self.items()}


class ViT(VisionTransformer):
    """A vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1).

    It maps square images `(N, in_channels, image_size, image_size)` to logits `{task: (N, classes)}`, each by a linear
    head on the class token. Every layer but the heads keeps torchvision's name. The defaults are small enough to train
    on a CPU; `vit_b_16` has the paper's sizes.

    Args:
        tasks: `{task name: number of classes}`.
        in_channels: channels of the input image.
        image_size: its height and width, in pixels: a number, or both if they are equal.
        patch_size: height and width of a patch, in pixels; the image's must be a multiple.
        layers: of the encoder.
        attention_heads: of each layer.
        features: of a token.
        mlp_features: of the hidden layer of each MLP.
        dropout: the part of the activations that is dropped in training.

    Raises:
        UsageError: the images are not square, or cannot be cut into such patches.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 36,
        patch_size: int = 4,
        layers: int = 4,
        attention_heads: int = 4,
        features: int = 64,
        mlp_features: int = 128,
        dropout: float = 0.0,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height != width or height % patch_size:
            raise UsageError(
                f"Images of {height}x{width} pixels cannot be cut into a square of {patch_size}x{patch_size} patches: "
                f"their height must equal their width and be a multiple of {patch_size}. Choose another patch size, or "
                "resize the images."
            )
        super().__init__(height, patch_size, layers, attention_heads, features, mlp_features, dropout)
        # Torchvision's has three channels. This is its initialisation for any number of them.
        self.conv_proj = nn.Conv2d(in_channels, features, patch_size, stride=patch_size)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * patch_size**2)))
        nn.init.zeros_(self.conv_proj.get_parameter("bias"))
        # Not zero at the start, unlike torchvision's head: in the first step, the shared layers would have no gradient.
        self.heads = TaskHeads(tasks, features)


def vit_b_16(tasks: Mapping[str, int], in_channels: int = 3, image_size: int | tuple[int, int] = 224) -> ViT:
    """ViT-B/16, the base size of Dosovitskiy et al. (Table 1) on patches of 16x16 pixels.

    Args:
        tasks: `{task name: number of classes}`.
        in_channels: channels of the input image.
        image_size: its height and width, a multiple of 16.

    Raises:
        UsageError: the images are not square, or cannot be cut into such patches.
    """
    return ViT(tasks, in_channels, image_size, 16, layers=12, attention_heads=12, features=768, mlp_features=3072)
