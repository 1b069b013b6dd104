"""What profiling costs a model with a large sparse embedding: its step against a plain one in one run; its peak memory.

    python benchmarks/sparse_step.py                    # a table of 5,000,000 x 16, two tasks, sparse SGD
    python benchmarks/sparse_step.py --rounds 40 --device cuda

Before gradients stayed sparse, a profiled step cost hundreds of plain ones, and took T tables of memory.
"""

from __future__ import annotations

import argparse

import torch
from profile_step import Step, held_megabytes, repeated
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import recon
from recon.support.timing import step_seconds

ROWS, WIDTH, FIELDS = 5_000_000, 16, 8
STEPS = 30


class Clicks(nn.Module):
    """A table of embeddings that all fields share, a small network, and a head a task.

    Args:
        rows: of the table.
        tasks: how many heads.
    """

    def __init__(self, rows: int, tasks: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH, sparse=True)
        self.body = nn.Sequential(nn.Linear(FIELDS * WIDTH, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({f"task{number}": nn.Linear(32, 1) for number in range(tasks)})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Logits by task, of ids (N, FIELDS)."""
        features = self.body(self.table(ids).flatten(start_dim=1))
        return {task: head(features)[:, 0] for task, head in self.heads.items()}


class Case:
    """A model and a batch of random ids, another one in every step, with sparse SGD."""

    def __init__(self, rows: int, tasks: int, batch: int, device: str) -> None:
        self.model = Clicks(rows, tasks).to(device)
        self.batches = [torch.randint(rows, (batch, FIELDS), device=device) for _ in range(8)]
        self.targets = torch.rand(batch, device=device).round()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.steps = 0

    def losses(self) -> dict[str, Tensor]:
        """The forward pass."""
        self.steps += 1
        outputs = self.model(self.batches[self.steps % len(self.batches)])
        return {task: binary_cross_entropy_with_logits(out, self.targets) for task, out in outputs.items()}

    def plain(self) -> None:
        """A joint training step."""
        self.optimizer.zero_grad()
        torch.stack(list(self.losses().values())).sum().backward()
        self.optimizer.step()

    def by(self, method: str, profiler: recon.Profiler | None = None) -> Step:
        """A step by any method, profiled or not."""
        made = recon.methods.get(method)

        def step() -> None:
            self.optimizer.zero_grad()
            recon.backward(self.losses(), self.model, made, profiler=profiler)
            self.optimizer.step()

        return step


def main() -> None:
    """Print the ratios and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    for tasks in (2, 3):
        case = Case(args.rows, tasks, args.batch, args.device)
        table = 4 * args.rows * WIDTH / 2**20
        steps: dict[str, Step] = {
            "profiled": case.by("joint", recon.Profiler(case.model)),
            "sketched": case.by("joint", recon.Profiler(case.model, memory="sketch")),
            "pcgrad": case.by("pcgrad"),
            "graddrop": case.by("graddrop"),
        }
        # Many at a time: a busy machine interrupts a step of a few milliseconds, or it does not.
        many = {name: repeated(step, STEPS) for name, step in {"plain": case.plain, **steps}.items()}
        seconds = {name: total / STEPS for name, total in step_seconds(many, args.rounds).items()}
        ratios = ", ".join(f"{name} {seconds[name] / seconds['plain']:.2f}" for name in steps)
        print(f"{tasks} tasks, {args.rows} x {WIDTH}: plain {1000 * seconds['plain']:.2f} ms; times as long: {ratios}")
        peaks = {name: held_megabytes(step)[0] for name, step in {"plain": case.plain, **steps}.items()}
        print(f"  peak memory, MB: {', '.join(f'{n} {p:.1f}' for n, p in peaks.items())}; the table {table:.0f}")


if __name__ == "__main__":
    main()
