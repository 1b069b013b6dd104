"""The network, the problem and the trainings behind the files in this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError

import recon

LOSSES = {"sum": mse_loss, "first": mse_loss, "spread": l1_loss}
THIRD = 9  # the optimizer step of an interruption: the third of the second epoch


class Tiny(nn.Module):
    """Running statistics, dropout and a bare parameter, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.drop = nn.Dropout(0.2)
        self.mix = nn.Linear(6, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in LOSSES})
        self.double()

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)).relu()) * self.scale
        x = self.mix(x).tanh()
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def inputs(count: int) -> torch.Tensor:
    """`(count, 4)` numbers that no generator draws."""
    return torch.arange(4 * count, dtype=torch.float64).mul(1.7).sin().reshape(count, 4)


class Samples(Dataset):
    """Four numbers, and three questions about them."""

    def __init__(self, count: int) -> None:
        self.x = inputs(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        x = self.x[index]
        return x, {"sum": x.sum(), "first": -x[0] * x[1], "spread": x.std()}


def loaders(seed: int) -> tuple[DataLoader, DataLoader]:
    """Six batches of eight, and one to test on."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(Samples(48), 8, shuffle=True, generator=order), DataLoader(Samples(16), 16)


def problem() -> recon.Problem:
    """What the command line trains."""
    makers = {"sum": MeanSquaredError, "first": MeanSquaredError, "spread": MeanAbsoluteError}
    tasks = [
        recon.Task(name, loss, [recon.Metric("error", makers[name], higher_is_better=False)])
        for name, loss in LOSSES.items()
    ]
    return recon.Problem(
        "tiny",
        tasks,
        Tiny,
        loaders,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
        make_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        epochs=3,
        example_inputs=lambda: inputs(8),
    )


def fresh() -> Tiny:
    """A network whose weights no generator draws."""
    model = Tiny()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            steps = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_((steps * 0.9 + number).cos() / 2)
    return model


def branched() -> nn.Module:
    """Two tasks share their copy of a norm, the third has its own; each has its own copy of a bare parameter."""
    groups = {"norm": [["sum", "spread"], "first"], "scale": ["sum", "first", "spread"]}
    model = recon.convert(fresh(), recon.BranchPlan.grouped(groups, tuple(LOSSES)), inputs(8))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            parameter.add_(0.01 * number)  # copies that are not equal
    return model


def rotated() -> nn.Module:
    """A model with RotoGrad's rotations, trained for an epoch."""
    model = branched()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recon.train(model, loaders(3)[0], LOSSES, method="rotograd", optimizer=optimizer, epochs=1)
    return model


def train(kind: str, checkpoint: Path | None = None, *, resume: bool = False, stop=None):
    """Train or profile for three epochs.

    Args:
        kind: `joint`, `gradnorm` (on the branched model) or `profile`.
        checkpoint: keeps it.
        resume: go on from there.
        stop: called after every optimizer step.

    Returns:
        The model, and the map (`profile`) or the history.
    """
    torch.manual_seed(5)
    model = branched() if kind == "gradnorm" else fresh()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    if stop is not None:
        optimizer.register_step_post_hook(lambda *_: stop())
    kept = {"checkpoint": checkpoint, "resume": resume, "optimizer": optimizer, "epochs": 3}
    if kind == "profile":
        return model, recon.profile(model, loaders(3)[0], LOSSES, floor=None, **kept)
    return model, recon.train(model, loaders(3)[0], LOSSES, method=kind, **kept)
