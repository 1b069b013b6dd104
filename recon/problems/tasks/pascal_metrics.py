"""The metrics of PASCAL-Context's two binary maps, saliency and edges. Imports torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryPrecisionRecallCurve

from recon.problems.tasks.dense import IGNORE

THRESHOLDS = [step / 20 for step in range(4, 19)]  # of the probability that a pixel is salient: 0.2 to 0.9


class SaliencyIoU(Metric):
    """The intersection over union with the salient pixels, as a mean over images, at the best of 15 thresholds.

    ASTMT (Maninis et al., CVPR 2019) and those who compare with it report it as mIoU of saliency. An image in which
    nothing is salient and nothing was found counts as 1.
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(THRESHOLDS)), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits `(N, 1, H, W)` against 0, 1 or 255, `(N, H, W)`."""
        known, truth = (target != IGNORE)[:, None], (target == 1)[:, None]
        thresholds = torch.tensor(THRESHOLDS, device=output.device)[:, None, None]
        found = (output.sigmoid() > thresholds) & known
        intersection, union = (found & truth).sum(dim=(2, 3)), (found | truth).sum(dim=(2, 3))
        self.total += torch.where(union > 0, intersection / union.clamp(min=1), 1.0).sum(dim=0)
        self.images += len(output)

    def compute(self) -> Tensor:
        """The mean at the threshold that is best for all images together."""
        return self.total.max() / self.images


class EdgeF(BinaryPrecisionRecallCurve):
    """The F-measure of single pixels at the threshold that is best for all images together.

    It is stricter than the literature's odsF, which allows a pixel of an edge to be found a little beside its place and
    is computed by the benchmark program of BSDS500: compare it only with itself.
    """

    def __init__(self) -> None:
        super().__init__(thresholds=99, ignore_index=IGNORE, validate_args=False)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits `(N, 1, H, W)` against 0, 1 or 255, `(N, H, W)`."""
        super().update(output[:, 0].sigmoid(), target.int())  # torchmetrics would mistake some logits for probabilities

    def compute(self) -> Tensor:  # type: ignore[override]
        """The largest harmonic mean of precision and recall."""
        precision, recall, _ = super().compute()
        return (2 * precision * recall / (precision + recall)).nan_to_num(0).max()  # NaN where nothing was found
