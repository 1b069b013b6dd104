"""A residual network small enough to train on a CPU in a minute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., "Deep Residual Learning", CVPR 2016, Fig. 2).

    The shortcut is the identity where the shape stays, else a strided 1x1 convolution with its own norm
    (option B of section 3.3).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`, rounded up."""
        main = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(main + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, three basic blocks of 8, 16 and 32 channels, and one linear head for each task.

    Args:
        tasks: `{task name: number of classes}`.
        in_channels: channels of the input image.
    """

    def __init__(self, tasks: Mapping[str, int], in_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), bn=nn.BatchNorm2d(8), relu=nn.ReLU())
        )
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, stride=2), BasicBlock(16, 32, stride=2))
        self.heads = nn.ModuleDict({task: nn.Linear(32, classes) for task, classes in tasks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)` to logits `{task: (N, classes)}`."""
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return {task: head(features) for task, head in self.heads.items()}
