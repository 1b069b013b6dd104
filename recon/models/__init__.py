"""Backbones for problems: ordinary modules that know nothing about branching.

Each is made by `Backbone(tasks, ...)`, where `tasks` is `{task name: channels of its output}`, with `in_channels` of
images or `in_features` of vectors; one whose weights depend on the size of the images needs `image_size` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.models.experts import PLE, MMoE
    from recon.models.mobilenet_raspp import MobileNetV2RASPP
    from recon.models.mtan import MTAN
    from recon.models.resnet import ResNet18
    from recon.models.segnet import SegNet
    from recon.models.shared_bottom import SharedBottom
    from recon.models.small_resnet import SmallResNet
    from recon.models.torchvision_dense import deeplabv3_resnet50, fcn_resnet50
    from recon.models.vit import ViT, vit_b_16

__all__ = [
    "MTAN",
    "PLE",
    "MMoE",
    "MobileNetV2RASPP",
    "ResNet18",
    "SegNet",
    "SharedBottom",
    "SmallResNet",
    "ViT",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "vit_b_16",
]

if not TYPE_CHECKING:
    # Importing torchvision takes a second, which a problem with another backbone need not wait for.
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "MTAN": "mtan",
            "PLE": "experts",
            "MMoE": "experts",
            "MobileNetV2RASPP": "mobilenet_raspp",
            "ResNet18": "resnet",
            "SegNet": "segnet",
            "SharedBottom": "shared_bottom",
            "SmallResNet": "small_resnet",
            "ViT": "vit",
            "deeplabv3_resnet50": "torchvision_dense",
            "fcn_resnet50": "torchvision_dense",
            "vit_b_16": "vit",
        },
    )

KINDS = {
    "MTAN": "dense",
    "PLE": "vectors",
    "MMoE": "vectors",
    "MobileNetV2RASPP": "dense",
    "ResNet18": "images",
    "SegNet": "dense",
    "SharedBottom": "vectors",
    "SmallResNet": "images",
    "ViT": "images",
    "deeplabv3_resnet50": "dense",
    "fcn_resnet50": "dense",
    "vit_b_16": "images",
}
"""A backbone's inputs and outputs.

- "images": `(N, C, H, W)` to logits `(N, classes)` for each task;
- "dense": `(N, C, H, W)` to maps `(N, channels, H, W)`;
- "vectors": `(N, F)` to logits `(N, classes)`.
"""
