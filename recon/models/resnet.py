"""Torchvision's ResNet-18 with a linear head for each task."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


class ResNet18(ResNet):
    """ResNet-18 (He et al., CVPR 2016) whose last layer computes features, with a linear head on them for each task.

    With one input channel and 100 features it is the network that Pareto MTL (Lin et al., NeurIPS 2019, section 6.1)
    and Recon (Shi et al., ICLR 2023) train on Multi-Fashion+MNIST. Every layer but the heads keeps torchvision's name:
    `conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`. These are also the names in Recon's published conflict scores.

    Args:
        tasks: `{task name: number of classes}`.
        in_channels: channels of the input image.
        features: how many features `fc` computes for the heads. None: there is no `fc`, and the heads get the 512
            pooled features.
    """

    def __init__(self, tasks: Mapping[str, int], in_channels: int = 1, features: int | None = 100) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=features or 1)
        if features is None:
            features, self.fc = 512 * BasicBlock.expansion, nn.Identity()
        # As in their code, the stem comes after torchvision's initialisation, and keeps PyTorch's own.
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.heads = nn.ModuleDict({task: nn.Linear(features, classes) for task, classes in tasks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)` to logits `{task: (N, classes)}`."""
        features = F.relu(super().forward(x))
        return {task: head(features) for task, head in self.heads.items()}
