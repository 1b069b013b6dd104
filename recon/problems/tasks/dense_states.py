"""The torchmetrics behind the metrics of depth and of surface normals. Imports torchmetrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

BINS_PER_DEGREE = 100


class PixelMean(Metric):
    """Mean of a value over all known pixels; NaN where there are none."""

    total: Tensor
    pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pixels", torch.tensor(0), dist_reduce_fx="sum")

    def values(self, output: Tensor, target: Tensor) -> Tensor:
        """The values of the pixels whose target is known."""
        raise NotImplementedError

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch."""
        values = self.values(output, target)
        self.total += values.sum()
        self.pixels += values.numel()

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.pixels


class AbsoluteError(PixelMean):
    """Mean of |output - target|."""

    def values(self, output: Tensor, target: Tensor) -> Tensor:
        """For each pixel whose target is not 0."""
        return (output - target).abs()[target != 0]


class RelativeError(PixelMean):
    """Mean of |output - target| / |target|."""

    def values(self, output: Tensor, target: Tensor) -> Tensor:
        """For each pixel whose target is not 0."""
        known = target != 0
        return (output - target).abs()[known] / target[known].abs()


class MeanAngle(PixelMean):
    """Mean angle in degrees."""

    def values(self, output: Tensor, target: Tensor) -> Tensor:
        """For each pixel whose target is not the zero vector."""
        return angles(output, target)


class AnglesWithin(PixelMean):
    """The share of angles below so many degrees."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def values(self, output: Tensor, target: Tensor) -> Tensor:
        """1 or 0 for each pixel whose target is not the zero vector."""
        return (angles(output, target) < self.degrees).float()


class MedianAngle(Metric):
    """The median angle, from a histogram: the angles of a whole test set do not fit into memory."""

    histogram: Tensor

    def __init__(self) -> None:
        super().__init__()
        bins = torch.zeros(180 * BINS_PER_DEGREE, dtype=torch.long)
        self.add_state("histogram", bins, dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch. A NaN in the output counts as 180 degrees."""
        bins = (angles(output, target).nan_to_num(nan=180.0) * BINS_PER_DEGREE).long()
        last = len(self.histogram) - 1
        self.histogram += torch.bincount(bins.clamp(max=last), minlength=last + 1)

    def compute(self) -> Tensor:
        """The middle of the bin that holds the median; NaN where there are no pixels."""
        below = self.histogram.cumsum(0)
        if not below[-1]:
            return torch.tensor(torch.nan, device=below.device)
        middle = torch.searchsorted(below, (below[-1] + 1) // 2)
        return (middle + 0.5) / BINS_PER_DEGREE


def angles(output: Tensor, target: Tensor) -> Tensor:
    """Degrees between `(N, 3, H, W)` each, where the target is not the zero vector; 90 if the output is."""
    cosines = F.cosine_similarity(output.float(), target.float(), dim=1)[target.any(dim=1)]
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))
