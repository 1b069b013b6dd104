"""MobileNetV2 at output stride 16 with a reduced ASPP and a decoder for each task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

_DILATED = 14  # the first block of torchvision's that works at stride 32
_LOW = 3  # the last one at stride 4, with 24 channels


class MobileNetV2RASPP(nn.Module):
    """A small network for PASCAL-Context, from torchvision's MobileNetV2.

    The trunk is MobileNetV2 (Sandler et al., CVPR 2018) without its last layer of 1280 channels. As in ASTMT (Maninis
    et al., CVPR 2019), dilated convolutions replace its last stride, so that features have a sixteenth of the image's
    resolution. They go to the reduced ASPP of Sandler et al., section 6.3, and from there to each task's decoder, that
    of DeepLabv3+ (Chen et al., ECCV 2018) with separable convolutions, as in Brüggemann et al. ("Automated Search for
    Resource-Efficient Branched Multi-Task Networks", BMVC 2020).

    The trunk's layers keep torchvision's names: `features.0.0`, ..., `features.17.conv.3`.

    Args:
        tasks: `{task name: number of channels}`.
        in_channels: channels of the input image.
        width: channels of the R-ASPP and of the decoders.
    """

    def __init__(self, tasks: Mapping[str, int], in_channels: int = 3, width: int = 128) -> None:
        super().__init__()
        self.features = mobilenet_v2().features[:-1]
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        _dilate(self.features[_DILATED:])
        self.raspp = RASPP(320, width)
        self.heads = nn.ModuleDict({task: Decoder(width, 24, channels) for task, channels in tasks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)` to `{task: (N, channels, H, W)}`."""
        size = x.shape[2:]
        low = self.features[: _LOW + 1](x)
        high = self.raspp(self.features[_LOW + 1 :](low))
        return {
            task: F.interpolate(head(high, low), size, mode="bilinear", align_corners=False)
            for task, head in self.heads.items()
        }


class RASPP(nn.Module):
    """Reduced atrous spatial pyramid pooling: of ASPP's branches, the 1x1 convolution and the pooled image."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.local = _conv(in_channels, width)
        self.pooled = _conv(in_channels, width)
        self.project = _conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, width, H, W)`."""
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True))
        return self.project(torch.cat([self.local(x), pooled.expand(-1, -1, *x.shape[2:])], dim=1))


class Decoder(nn.Module):
    """The decoder of DeepLabv3+: features of the last layers, refined with those of the first ones."""

    def __init__(self, width: int, low_channels: int, channels: int, reduced: int = 48) -> None:
        super().__init__()
        self.reduce = _conv(low_channels, reduced)
        self.refine = nn.Sequential(*_separable(width + reduced, width), *_separable(width, width))
        self.predict = nn.Conv2d(width, channels, 1)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """`(N, width, h, w)` and `(N, low_channels, H, W)` to `(N, channels, H, W)`."""
        high = F.interpolate(high, low.shape[2:], mode="bilinear", align_corners=False)
        return self.predict(self.refine(torch.cat([high, self.reduce(low)], dim=1)))


def _dilate(blocks: nn.Module) -> None:
    """Take the stride from the first block, and make those after it reach twice as far, so that they see the same."""
    for conv in blocks.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
            else:
                conv.dilation = conv.padding = (2, 2)


def _separable(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    return _conv(in_channels, in_channels, kernel=3, groups=in_channels), _conv(in_channels, out_channels)


def _conv(in_channels: int, out_channels: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")  # as in the trunk
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))
