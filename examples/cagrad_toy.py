"""The two-objective toy of the CAGrad paper: where gradient methods end, from five starts, as a picture.

Run it from the folder above; it takes less than a minute:

    python examples/cagrad_toy.py cagrad_toy.png

The problem is that of the first figure of "Conflict-Averse Gradient Descent for Multi-task Learning" (Liu, Liu, Jin,
Stone, Liu, NeurIPS 2021, arXiv 2110.14048), which Nash-MTL and FAMO took up: two parameters, two objectives. In the
upper half plane each objective has a narrow, curved valley, and the two are of very different steepness; in the lower
one lie the Pareto set and, in its middle, the minimum of the mean.

What differs from the paper's figure:

- Five starts, those of FAMO (Liu, Feng, Stone, Liu, NeurIPS 2023), where the paper draws three of them.
- Adam with lr 0.008 for 16,000 steps instead of 0.001 for 100,000. The sum of the gradients, which the paper shows
  stuck in the valleys, bounces out of them with such long steps, and ends at the minimum too.
- A start at x2 = 0 lies on the fold between the half planes, where there is no gradient: the lower plane's is taken.
- PCGrad and CAGrad are recon's own, in sum scale, CAGrad without the small constants of the published code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

import recon

METHODS = {"joint": "joint", "MGDA": "mgda", "PCGrad": "pcgrad", "CAGrad, c = 0.5": "cagrad:c=0.5"}
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (0.0, 0.0), (9.0, 9.0), (10.0, -8.0))
STEPS, LEARNING_RATE = 16_000, 0.008
_LOOK = 500  # steps


class Toy(nn.Module):
    """The two losses at some points; the points are the parameters.

    Args:
        points: (..., 2).
    """

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(points)

    def forward(self) -> dict[str, Tensor]:
        """`{task: (...)}`, a loss for every point."""
        first, second = objectives(self.points)
        return {"first": first, "second": second}


def objectives(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both objectives (...) at the points (..., 2): logarithms above x2 = 0, paraboloids below, zero in between."""
    x1, x2 = x.unbind(-1)
    bend, fade = x2.tanh(), (torch.where(x2 > 0, x2, -x2) / 2).tanh()
    above = [(side.abs().clamp(min=5e-6).log() + 6) for side in (-(x1 + 7) / 2 + bend, (7 - x1) / 2 - bend)]
    below = [((x1 - center) ** 2 + (x2 + 8) ** 2 / 10) / 10 - 20 for center in (7, -7)]
    first, second = (torch.where(x2 > 0, a, b) * fade for a, b in zip(above, below, strict=True))
    return first, second


def minima(weights: Tensor) -> Tensor:
    """Where `w` times the first objective plus `1 - w` times the second is least, for each of the weights, by Newton.

    With weights from 0 to 1, these are the Pareto set.

    Args:
        weights: (W,).

    Returns:
        (W, 2).
    """

    def weighted(x: Tensor, weight: Tensor) -> Tensor:
        first, second = objectives(x)
        return weight * first + (1 - weight) * second

    x = torch.stack([14 * weights - 7, torch.full_like(weights, -8)], dim=-1)
    for _ in range(10):
        x = x - torch.linalg.solve(vmap(hessian(weighted))(x, weights), vmap(grad(weighted))(x, weights))
    return x


BEST = minima(torch.tensor([0.5], dtype=torch.float64))[0]
PARETO = minima(torch.linspace(0, 1, 501, dtype=torch.float64))


def descend(methods: list[str], starts: Tensor, steps: int = STEPS, lr: float = LEARNING_RATE) -> Tensor:
    """Let each method run from each start, all at once: none knows of the others, and Adam goes by coordinate.

    Args:
        methods: M of them, as `recon.methods.parse` takes them.
        starts: (S, 2).
        steps: how many.
        lr: Adam's.

    Returns:
        (steps + 1, M, S, 2) where they were.
    """
    toy = Toy(starts.repeat(len(methods), 1, 1))
    solvers = [recon.methods.parse(method) for method in methods]
    optimizer = torch.optim.Adam(toy.parameters(), lr=lr)
    path = [toy.points.detach().clone()]
    moving: Sequence[int] = range(toy.points[..., 0].numel())
    for step in range(steps):
        if step % _LOOK == 0 and step:  # a path that has arrived needs no more solving
            moved = (path[-1] - path[-1 - _LOOK]).norm(dim=-1).flatten()
            moving = [i for i in moving if moved[i] > 1e-3]
        losses = toy().values()
        gradients = [torch.autograd.grad(loss.sum(), toy.points, retain_graph=True)[0] for loss in losses]
        J = torch.stack(gradients, dim=-2).flatten(end_dim=1)  # (M S, T, 2): the task gradients of every path
        updates = torch.zeros_like(J[:, 0])
        for i in moving:
            updates[i] = solvers[i // len(starts)](J[i])
        toy.points.grad = updates.view_as(toy.points)
        optimizer.step()
        path.append(toy.points.detach().clone())
    return torch.stack(path)


def verdict(point: Tensor) -> str:
    """What kind of place a path has ended at."""
    first, second = objectives(point)
    if (first + second) / 2 < torch.stack(objectives(BEST)).mean() + 1e-3:
        return "minimum of the mean"
    if (PARETO - point).norm(dim=-1).min() < 0.05:
        return "on the Pareto set only"
    return "stuck in a valley" if point[1] > 0 else "on its way"


def report(path: Tensor) -> None:
    """Print where each method ended."""
    print(f"{'method':<16} {'start':>12}   {'end':>14} {'first':>8} {'second':>8} {'mean':>8}")
    for name, ends in zip(METHODS, path[-1], strict=True):
        for start, end in zip(STARTS, ends, strict=True):
            first, second = (value.item() for value in objectives(end))
            places = f"({start[0]:4.1f}, {start[1]:4.1f})   ({end[0]:5.2f}, {end[1]:5.2f})"
            print(f"{name:<16} {places} {first:8.2f} {second:8.2f} {(first + second) / 2:8.2f}  {verdict(end)}")


def draw(path: Tensor, file: str) -> None:
    """Save the picture: a panel for each method."""
    side = torch.linspace(-11, 11, 300, dtype=torch.float64)
    x2, x1 = torch.meshgrid(side, side, indexing="ij")
    mean = torch.stack(objectives(torch.stack([x1, x2], dim=-1))).mean(dim=0)
    figure, axes = plt.subplots(1, len(METHODS), figsize=(15, 4.3), sharey=True, layout="constrained")
    for axis, name, paths in zip(axes, METHODS, path.unbind(1), strict=True):
        contours = axis.contourf(x1, x2, mean, levels=24, cmap="Greys_r", alpha=0.55)
        axis.contour(x1, x2, mean, levels=torch.arange(0.5, 8, 0.5), colors="grey", linewidths=0.4)
        axis.plot(*PARETO.T, color="tab:blue", linewidth=5, alpha=0.6, label="Pareto set")
        for number, line in enumerate(paths.unbind(1)):
            axis.plot(*line[::20].T, color="tab:red", linewidth=1.6, label=None if number else "path")
            axis.plot(*line[0], "o", color="black", markersize=5, label=None if number else "start")
            axis.plot(*line[-1], "X", color="tab:red", markeredgecolor="white", markersize=10)
        axis.plot(*BEST, "*", color="gold", markeredgecolor="black", markersize=15, label="minimum of the mean")
        axis.set(title=name, xlabel="x1", xlim=(-11, 11), ylim=(-11, 11), aspect="equal")
    axes[0].set_ylabel("x2")
    figure.colorbar(contours, ax=axes, label="mean of the two objectives", shrink=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(file: str = "cagrad_toy.png") -> None:
    """Run, print and draw."""
    path = descend(list(METHODS.values()), torch.tensor(STARTS, dtype=torch.float64))
    report(path)
    draw(path, file)
    print(f"Saved {file}. In the paper, joint training stays in the upper valleys; here its steps are longer.")


if __name__ == "__main__":
    main(*sys.argv[1:])
