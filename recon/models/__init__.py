"""Backbones of the built-in problems: ordinary modules that know nothing of branching."""

from recon.models.small_resnet import SmallResNet

__all__ = ["SmallResNet"]
