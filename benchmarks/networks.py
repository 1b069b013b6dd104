"""The networks of the benchmarks: ResNets with a head per task, and ResNet-18 branched by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50


class ResNet18(nn.Module):
    """Torchvision's ResNet-18 for one-channel images, with a linear head per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.backbone = resnet18(num_classes=100)
        self.backbone.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.heads = _heads(tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 1, 36, 36) to logits (N, 10) by task."""
        features = F.relu(self.backbone(x))
        return {task: head(features) for task, head in self.heads.items()}


class ResNet50(nn.Module):
    """Torchvision's ResNet-50, with a linear head per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.backbone = resnet50(num_classes=100)
        self.heads = _heads(tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to logits (N, 10) by task."""
        features = F.relu(self.backbone(x))
        return {task: head(features) for task, head in self.heads.items()}


class HandBranchedResNet18(nn.Module):
    """`ResNet18` with lists of its norms, the stem and the convolutions of layer1, an entry per task.

    What you would write without recon. The entry of branched layer `<layer>.branches.task<i>` is `<layer>.<i>`.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.backbone = _HandBackbone(tasks)
        self.heads = _heads(tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 1, 36, 36) to logits (N, 10) by task."""
        return {task: head(F.relu(self.backbone(x, index))) for index, (task, head) in enumerate(self.heads.items())}


class _HandBackbone(nn.Module):
    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.conv1 = _per_task(tasks, lambda: nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False))
        self.bn1 = _per_task(tasks, lambda: nn.BatchNorm2d(64))
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.ModuleList([_OwnBlock(tasks, 64), _OwnBlock(tasks, 64)])
        self.layer2 = nn.ModuleList([_NormsBlock(tasks, 64, 128, stride=2), _NormsBlock(tasks, 128, 128)])
        self.layer3 = nn.ModuleList([_NormsBlock(tasks, 128, 256, stride=2), _NormsBlock(tasks, 256, 256)])
        self.layer4 = nn.ModuleList([_NormsBlock(tasks, 256, 512, stride=2), _NormsBlock(tasks, 512, 512)])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, 100)

    def forward(self, x: Tensor, task: int) -> Tensor:
        x = self.maxpool(self.relu(self.bn1[task](self.conv1[task](x))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = block(x, task)
        return self.fc(self.avgpool(x).flatten(1))


class _OwnBlock(nn.Module):
    """A block whose every layer is the task's own."""

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.conv1 = _per_task(tasks, lambda: nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.bn1 = _per_task(tasks, lambda: nn.BatchNorm2d(width))
        self.conv2 = _per_task(tasks, lambda: nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.bn2 = _per_task(tasks, lambda: nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, task: int) -> Tensor:
        out = self.relu(self.bn1[task](self.conv1[task](x)))
        out = self.bn2[task](self.conv2[task](out))
        out += x
        return self.relu(out)


class _NormsBlock(nn.Module):
    """A block whose norms are the task's own."""

    def __init__(self, tasks: int, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _per_task(tasks, lambda: nn.BatchNorm2d(width))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = _per_task(tasks, lambda: nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.ModuleList | None = None
        if stride != 1:
            conv = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.downsample = nn.ModuleList([conv, _per_task(tasks, lambda: nn.BatchNorm2d(width))])

    def forward(self, x: Tensor, task: int) -> Tensor:
        identity = x
        if self.downsample is not None:
            conv, norms = self.downsample
            assert isinstance(norms, nn.ModuleList)
            identity = norms[task](conv(x))
        out = self.relu(self.bn1[task](self.conv1(x)))
        out = self.bn2[task](self.conv2(out))
        out += identity
        return self.relu(out)


def _per_task(tasks: int, make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(tasks))


def _heads(tasks: int) -> nn.ModuleDict:
    return nn.ModuleDict({f"task{i}": nn.Linear(100, 10) for i in range(tasks)})
