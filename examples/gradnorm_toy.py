"""The toy problem of the GradNorm paper (Chen et al., ICML 2018, section 4): ten regressions of very different scale.

    python examples/gradnorm_toy.py

Task i is to learn `sigma_i tanh((B + eps_i) x)`: B is common to all tasks, eps_i is its own, and so is its scale
sigma_i, which decides the task's weight in the sum of the losses. What counts is the task-normalised test loss, the
mean of `L_i(t) / L_i(0)`. The network has four layers of 100 ReLUs and a linear head for each task.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import recon

INPUTS, OUTPUTS, WIDTH = 250, 100, 100


class Tasks:
    """The functions to learn, and samples of them.

    The paper draws B from N(0, 10) and eps from N(0, 3.5), and does not say how long x is; here, its length is about
    0.1, where tanh is not a mere sign.
    """

    def __init__(self, sigmas: Sequence[float], seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.sigmas = sigmas
        common = 10 * self._normal(OUTPUTS, INPUTS)
        self.matrices = [common + 3.5 * self._normal(OUTPUTS, INPUTS) for _ in sigmas]

    def sample(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs `(count, 250)`, and for each task targets `(count, 100)`."""
        x = self._normal(count, INPUTS)
        unit = 0.1 * x / INPUTS**0.5
        pairs = zip(self.sigmas, self.matrices, strict=True)
        return x, {f"task{i}": sigma * torch.tanh(unit @ M.T) for i, (sigma, M) in enumerate(pairs)}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)


class Net(nn.Module):
    """Four shared layers, and a head for each task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        pairs = itertools.pairwise([INPUTS, WIDTH, WIDTH, WIDTH, WIDTH])
        self.trunk = nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())))
        self.heads = nn.ModuleDict({f"task{i}": nn.Linear(WIDTH, OUTPUTS) for i in range(tasks)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`{task: (N, 100)}`."""
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


@dataclass
class Result:
    """Of one training: the normalised test loss, and every task's weight, each time it was looked at."""

    losses: list[float]
    weights: list[Tensor]


def train(method: recon.methods.Method, sigmas: Sequence[float], steps: int, look_every: int, seed: int = 0) -> Result:
    """Train a fresh network on fresh samples in every step."""
    tasks = Tasks(sigmas, seed)
    torch.manual_seed(seed)
    model = Net(len(sigmas))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    test = tasks.sample(500)
    start = test_losses(model, *test)
    result = Result([], [])
    for step in range(1, steps + 1):
        x, targets = tasks.sample(50)
        outputs = model(x)
        losses = {task: (outputs[task] - targets[task]).square().mean() for task in targets}
        optimizer.zero_grad()
        weights = recon.backward(losses, model, method)
        optimizer.step()
        if step % look_every == 0:
            result.losses.append(float((test_losses(model, *test) / start).mean()))
            result.weights.append(torch.stack(list(weights.values())))
    return result


@torch.no_grad()
def test_losses(model: nn.Module, x: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """(T,) on the test set."""
    outputs = model(x)
    return torch.stack([(outputs[task] - targets[task]).square().mean() for task in targets])


def main() -> None:
    """Print both trainings side by side."""
    sigmas = [1, 2, 4, 8, 16, 32, 3, 6, 12, 24]
    steps, look_every = 1000, 200
    equal = train(recon.methods.get("joint"), sigmas, steps, look_every)
    gradnorm = train(recon.methods.get("gradnorm", alpha=0.12, lr=5e-3), sigmas, steps, look_every)
    print("step  equal weights  GradNorm   (task-normalised test loss: 1 at the start)")
    for i, (a, b) in enumerate(zip(equal.losses, gradnorm.losses, strict=True), 1):
        print(f"{i * look_every:4}  {a:13.3f}  {b:8.3f}")
    print("\nsigma  weight half-way  weight at the end")
    for i in sorted(range(len(sigmas)), key=lambda i: sigmas[i]):
        half, end = (float(gradnorm.weights[at][i]) for at in (len(gradnorm.weights) // 2 - 1, -1))
        print(f"{sigmas[i]:5}  {half:15.4f}  {end:17.4f}")


if __name__ == "__main__":
    main()
