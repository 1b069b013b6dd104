"""Two tasks with a data set each: alternating tasks in a plain loop, and joint steps of the same loop.

Run it from the folder above:

    python examples/alternating_tasks.py

Whoever alternates tasks, an optimizer step for each, has no two gradients to compare: nothing can be profiled, and
pcgrad or cagrad would do nothing. A `recon.Window` makes one step of both: each loss is differentiated as soon as it
is there, so that the memory is that of one task's graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import recon


class Digits(nn.Module):
    """A body and two heads: is the digit odd, and is it above four."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 2) for task in ("odd", "large")})

    def forward(self, images: Tensor, task: str) -> Tensor:
        """(N, 2) logits of one task."""
        return self.heads[task](self.body(images))


def loaders() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """Images and labels of each task: two halves of the digits, which no image is in both of."""
    data = load_digits()
    images, digits = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    labels = {"odd": digits % 2, "large": (digits > 4).long()}
    halves = {"odd": slice(None, None, 2), "large": slice(1, None, 2)}
    return {
        task: DataLoader(TensorDataset(images[half], labels[task][half]), batch_size=32, shuffle=True)
        for task, half in halves.items()
    }


def train(method: str, epochs: int = 2) -> tuple[nn.Module, recon.ConflictMap]:
    """Joint steps of alternating tasks, profiled."""
    torch.manual_seed(0)
    model, data = Digits(), loaders()
    model(next(iter(data["odd"]))[0], "odd")  # the lazy layer learns its size
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    profiler = recon.Profiler(model)
    window = recon.Window(model, method, profiler=profiler, tasks=tuple(data))
    for _ in range(epochs):
        for task, images, labels in alternating(data):
            window.add(task, cross_entropy(model(images, task), labels))
            if set(window.added) == set(data):
                optimizer.zero_grad()
                window.step()
                optimizer.step()
    return model, profiler.conflict_map()


def alternating(data: dict[str, DataLoader[tuple[Tensor, ...]]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A batch of one task, then one of the other."""
    for batches in zip(*data.values(), strict=True):
        for task, (images, labels) in zip(data, batches, strict=True):
            yield task, images, labels


def main() -> None:
    """Train and show where the tasks conflict."""
    _, cmap = train("pcgrad")
    for name, rate in cmap.scores(by="rate").items():
        print(f"{name:8} conflicts in {rate:.0%} of {cmap.steps} joint steps")


if __name__ == "__main__":
    main()
