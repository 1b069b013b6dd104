"""PASCAL-Context: five maps of one image, from its classes to its edges, one task for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from recon.models import MobileNetV2RASPP
from recon.models.pretrained import load_pretrained
from recon.problems.file_loading import FileLoader
from recon.problems.files.pascal_mt import CLASSES, FOLDERS, SPLITS, PascalMT, collate, read_names
from recon.problems.files.roots import open_root, require_files
from recon.problems.losses import Loss
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Metric, Problem, ReducedRun, Search, Task
from recon.problems.tasks.dense import IGNORE, segmentation_loss
from recon.problems.tasks.dense_metrics import mean_angle, mean_iou
from recon.problems.tasks.metrics import late
from recon.support.network.forward import Batch

DESCRIPTION = (
    "classes, parts, saliency, normals and edges, 5 tasks, 512x512 pixels, MobileNetV2; --data-root: PASCAL_MT"
)

NAME = "pascal-context"
FOLDER = "PASCAL_MT"
_STATES = "recon.problems.tasks.pascal_metrics"
PART_CLASSES = 7
SIZE = 512
BATCH = 6
EPOCHS = 130
QUICK = ReducedRun(epochs=2, train_batches=20, test_batches=20, timing_rounds=3)  # a step needs seconds of a CPU

_EXPECTED = (
    f"Expected are {', '.join(f'{FOLDER}/{path}' for path in (*FOLDERS, *SPLITS.values()))}, as the archive of ASTMT "
    "has them (https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz, of "
    "https://github.com/facebookresearch/astmt). It is made of PASCAL VOC 2010 "
    "(http://host.robots.ox.ac.uk/pascal/VOC/voc2010) and of PASCAL-Context "
    "(https://cs.stanford.edu/~roozbeh/pascal-context)."
)


def pascal_context(
    data_root: str | Path | None = None, train_samples: int | None = None, pretrained: str | Path | None = None
) -> Problem:
    """The classes, human parts, salient pixels, surface normals and edges of 10,103 images.

    The images and the first and the last of these are PASCAL-Context's (Mottaghi et al., CVPR 2014), parts are
    PASCAL-Part's (Chen et al., CVPR 2014); saliency and normals are the predictions of other networks. As a problem of
    five tasks, with these losses and their weights, it is that of ASTMT (Maninis et al., "Attentive Single-Tasking of
    Multiple Tasks", CVPR 2019, section 5 and its code). Network, optimizer and schedule are those of Recon (Shi et
    al., ICLR 2023): MobileNetV2 with R-ASPP, Adam at 1e-4, batches of 6, 130 epochs, a tenth of the rate after 70 and
    again after 100.

    Inputs are `(N, 3, 512, 512)`, float32, normalised as ImageNet's; smaller images are padded, and in training half
    of them are mirrored. See `recon.problems.files.pascal_mt` for the targets. Images without a human have no parts:
    they do not count in that task, and a batch of nothing else lacks it.

    Edges are judged pixel by pixel: do not compare the number with the literature's odsF. See
    `recon.problems.tasks.pascal_metrics`, also for saliency's.

    `data_root` holds `PASCAL_MT`, as ASTMT's archive lays it out; `train_samples` takes the first so many images only;
    `pretrained` is a file of torchvision's MobileNetV2 weights, from which the trunk starts.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    require_files(NAME, root, [f"{FOLDER}/{path}" for path in (*FOLDERS, *SPLITS.values())], _EXPECTED)
    names = cache(lambda: _names(root / FOLDER, train_samples))

    def make_loaders(seed: int) -> tuple[Iterable[Batch], Iterable[Batch]]:
        train, test = (PascalMT(root / FOLDER, names()[split], SIZE) for split in SPLITS)
        return FileLoader(train, BATCH, collate, seed), FileLoader(test, BATCH, collate, seed=None)

    return Problem(
        name=NAME,
        tasks=_tasks(),
        make_model=partial(_make_model, pretrained),
        make_loaders=make_loaders,
        make_optimizer=lambda parameters: Adam(parameters, lr=1e-4),
        make_scheduler=_scheduler,
        epochs=EPOCHS,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(2, 3, SIZE, SIZE),
        search=Search(threshold=-0.02, top_k=85, epochs=40),
        quick=QUICK,
        cagrad_c=0.1,
    )


def _tasks() -> list[Task]:
    saliency = Metric("max_iou", late(_STATES, "SaliencyIoU"))
    edge = Metric("max_f", late(_STATES, "EdgeF"))
    return [
        Task("semseg", segmentation_loss, [mean_iou(CLASSES, IGNORE)]),
        Task("human_parts", _times(2, segmentation_loss), [mean_iou(PART_CLASSES, IGNORE)]),
        Task("saliency", _times(5, balanced_cross_entropy), [saliency]),
        Task("normals", _times(10, normals_loss), [mean_angle()]),
        Task("edge", _times(50, partial(balanced_cross_entropy, positive_weight=0.95)), [edge]),
    ]


def _make_model(pretrained: str | Path | None) -> MobileNetV2RASPP:
    channels = {"semseg": CLASSES, "human_parts": PART_CLASSES, "saliency": 1, "normals": 3, "edge": 1}
    model = MobileNetV2RASPP(channels)
    if pretrained is not None:
        unused, fresh = ("features.18.", "classifier."), ("raspp.", "heads.")
        load_pretrained(model, pretrained, "mobilenet_v2", unused=unused, fresh=fresh)
    return model


def _scheduler(optimizer: Optimizer, steps: int) -> MultiStepLR:
    return MultiStepLR(optimizer, [math.ceil(steps * epoch / EPOCHS) for epoch in (70, 100)], gamma=0.1)


def _names(folder: Path, train_samples: int | None) -> dict[str, list[str]]:
    names = {split: read_names(folder, split) for split in SPLITS}
    check_available(NAME, len(names["train"]), train_samples)
    return {**names, "train": names["train"][:train_samples]}


# The losses of ASTMT: means over the pixels whose target is known, of which there must be some.


def balanced_cross_entropy(output: Tensor, target: Tensor, positive_weight: float | None = None) -> Tensor:
    """Binary cross-entropy that keeps many pixels of one kind from outweighing few of the other.

    The output is logits `(N, 1, H, W)`, the target `(N, H, W)` of 0, 1 and `IGNORE`. Ones have `positive_weight`, from
    0 to 1, and zeros 1 minus this; when not given, it is the share of zeros in the batch (Xie and Tu,
    "Holistically-Nested Edge Detection", ICCV 2015, eq. 2).
    """
    logits = output[:, 0].to(torch.promote_types(output.dtype, torch.float32))  # so many pixels overflow half precision
    known, ones = target != IGNORE, (target == 1).to(logits.dtype)
    weight = 1 - ones.sum() / known.sum() if positive_weight is None else positive_weight
    weights = (ones * weight + (1 - ones) * (1 - weight)) * known
    return F.binary_cross_entropy_with_logits(logits, ones, weights, reduction="sum") / known.sum()


def normals_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean absolute error of the coordinates, `(N, 3, H, W)`, once the output is of length 1; 0 is not known."""
    known = target.any(dim=1, keepdim=True)
    return ((F.normalize(output, dim=1) - target).abs() * known).sum() / (3 * known.sum())


def _times(weight: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda output, target: weight * loss(output, target)
