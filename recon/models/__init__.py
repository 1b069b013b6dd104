"""Backbones of the built-in problems: ordinary modules that know nothing of branching."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon.models.mobilenet_raspp import MobileNetV2RASPP
    from recon.models.mtan import MTAN
    from recon.models.resnet import ResNet18
    from recon.models.segnet import SegNet
    from recon.models.small_resnet import SmallResNet

__all__ = ["MTAN", "MobileNetV2RASPP", "ResNet18", "SegNet", "SmallResNet"]

_HOME = {
    "MTAN": "mtan",
    "MobileNetV2RASPP": "mobilenet_raspp",
    "ResNet18": "resnet",
    "SegNet": "segnet",
    "SmallResNet": "small_resnet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recon.models' has no attribute {name!r}")
    # On first use: importing torchvision takes a second, which a problem with another backbone need not wait for.
    return getattr(importlib.import_module(f"recon.models.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
