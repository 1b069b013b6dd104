"""What profiling costs: its step against a plain joint step, alternating in one run; and its peak memory.

    python benchmarks/profile_step.py            # ResNet-18, 1x36x36, batch 64; two and three tasks
    python benchmarks/profile_step.py --rounds 30 --device cuda

The bound for T tasks is set by one forward and T backward passes, about (1 + 2 T) / 3 of a plain step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import ResNet18
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import recon
from recon.problems import get
from recon.timing import step_seconds

Step = Callable[[], None]


def resnet_case(tasks: int) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The ResNet-18 and one batch."""
    model = ResNet18(tasks)
    return model, torch.randn(64, 1, 36, 36), {task: torch.randint(10, (64,)) for task in model.heads}


def digits_case() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The demo's model and one batch."""
    problem = get("digits")
    x, targets = next(iter(problem.make_loaders(0)[0]))
    return problem.make_model(), x, dict(targets)


def steps(model: nn.Module, x: Tensor, targets: dict[str, Tensor], device: str) -> tuple[Step, Step]:
    """A plain joint step and a profiled one, on the same model."""
    model, x, targets = model.to(device), x.to(device), {task: y.to(device) for task, y in targets.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    profiler = recon.Profiler(model)

    def losses() -> dict[str, Tensor]:
        out = model(x)
        return {task: F.cross_entropy(out[task], target) for task, target in targets.items()}

    def plain() -> None:
        optimizer.zero_grad()
        total: Tensor = sum(losses().values(), torch.zeros((), device=device))
        total.backward()
        optimizer.step()

    def profiled() -> None:
        optimizer.zero_grad()
        profiler.backward(losses())
        optimizer.step()

    return plain, profiled


def held_megabytes(step: Step) -> tuple[float, float]:
    """The memory of tensors above what is held before a step, in MB: at its peak, and after it.

    As the allocator saw it: what the process holds beyond its tensors does not count.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20, (torch.cuda.memory_allocated() - held) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    start = totals[0] - memory[0]["args"]["Bytes"]
    return (max(totals) - start) / 2**20, (totals[-1] - start) / 2**20


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'model':<22}{'tasks':>6}{'plain ms':>10}{'profiled ms':>13}{'ratio':>8}{'bound':>8}")
    for name, case, rounds in (
        ("digits, batch 128", digits_case(), 20 * args.rounds),  # short steps: their times scatter more
        ("ResNet-18, batch 64", resnet_case(2), args.rounds),
        ("ResNet-18, batch 64", resnet_case(3), args.rounds),
    ):
        plain, profiled = steps(*case, args.device)
        seconds = step_seconds({"plain": plain, "profiled": profiled}, rounds)
        ratio, tasks = seconds["profiled"] / seconds["plain"], len(case[2])
        print(
            f"{name:<22}{tasks:>6}{1000 * seconds['plain']:>10.1f}{1000 * seconds['profiled']:>13.1f}"
            f"{ratio:>8.2f}{(1 + 2 * tasks) / 3:>8.2f}"
        )
    for tasks in (2, 3):
        case = resnet_case(tasks)
        shared = sum(p.numel() for p in case[0].parameters()) * 4 / 2**20
        plain, profiled = steps(*case, args.device)
        peaks = []
        for step in (plain, profiled):
            step()  # the optimizer's state and the tallies are there from now on
            peaks.append(held_megabytes(step)[0])
        extra = peaks[1] - peaks[0]
        print(
            f"peak memory of a step, ResNet-18, {tasks} tasks: plain {peaks[0]:.0f} MB, profiled {peaks[1]:.0f} MB; "
            f"the difference is {extra / shared:.2f} × the shared parameters"
        )


if __name__ == "__main__":
    main()
