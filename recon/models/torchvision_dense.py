"""Torchvision's segmentation networks with a head for each task."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

FEATURES = 2048  # channels of ResNet-50's output


class DenseResNet50(nn.Module):
    """A ResNet-50 that all tasks share, and on it one of torchvision's heads for each task.

    Dilations replace the strides of the last two stages, so that its features have an eighth of the image's height and
    width, `(N, 2048, H / 8, W / 8)`; bilinear interpolation brings each head's output back to the image's size. The
    heads, with their atrous pyramids, are the tasks' own, as usual where such networks serve several tasks (Liu, Johns
    and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, split there after the encoder). Weights
    start as torchvision's.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], in_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        if in_channels != 3:
            backbone.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)` to raw values `{task: (N, channels, H, W)}`."""
        features = self.backbone(x)["out"]
        return {
            task: F.interpolate(head(features), size=x.shape[-2:], mode="bilinear", align_corners=False)
            for task, head in self.heads.items()
        }


def fcn_resnet50(tasks: Mapping[str, int], in_channels: int = 3) -> DenseResNet50:
    """A fully convolutional network (Long, Shelhamer and Darrell, CVPR 2015) as torchvision builds it on ResNet-50.

    Args:
        tasks: `{task name: channels of its output}`.
        in_channels: channels of the input image.
    """
    network = segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    heads = {t: FCNHead(FEATURES, channels) for t, channels in tasks.items()}
    return DenseResNet50(network.backbone, heads, in_channels)


def deeplabv3_resnet50(tasks: Mapping[str, int], in_channels: int = 3) -> DenseResNet50:
    """DeepLabv3 (Chen et al., "Rethinking Atrous Convolution", arXiv 1706.05587) as torchvision builds it on ResNet-50.

    The heads pool over whole images and normalise the result, so training needs batches of at least two.

    Args:
        tasks: `{task name: channels of its output}`.
        in_channels: channels of the input image.
    """
    network = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    heads = {t: DeepLabHead(FEATURES, channels) for t, channels in tasks.items()}
    return DenseResNet50(network.backbone, heads, in_channels)
