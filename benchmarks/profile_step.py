"""What profiling costs: its step against a plain joint step, alternating in one run; and its peak memory.

    python benchmarks/profile_step.py            # ResNet-18, 1x36x36, batch 64; two, three and forty tasks
    python benchmarks/profile_step.py --rounds 30 --device cuda

The bound for T tasks is set by one forward and T backward passes: (1 + 2 T) / 3 of a plain step if a backward pass
takes twice as long as a forward one; and it is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import ResNet18
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import recon
from recon.methods.gradients.jacobian import task_jacobian
from recon.methods.gradients.reach import find_reach
from recon.problems import get
from recon.profiling.floor import floor_steps
from recon.support.network.state import state_kept
from recon.support.random_states import global_states_kept, scatter_global_states
from recon.support.timing import step_seconds

Step = Callable[[], None]
MANY = 40
PLAIN = 10  # plain passes beside one step of many tasks


class Case:
    """A model on one batch, and its training steps.

    Args:
        model: `model(x) -> {task: logits}`.
        x: inputs.
        targets: `{task: classes}`.
        device: where it all runs.
    """

    def __init__(self, model: nn.Module, x: Tensor, targets: dict[str, Tensor], device: str) -> None:
        self.device = device
        self.model, self.x = model.to(device), x.to(device)
        self.targets = {task: target.to(device) for task, target in targets.items()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def losses(self) -> dict[str, Tensor]:
        """The forward pass."""
        out = self.model(self.x)
        return {task: F.cross_entropy(out[task], target) for task, target in self.targets.items()}

    def total(self) -> Tensor:
        """The forward pass, all losses in one."""
        return torch.stack(list(self.losses().values())).sum()

    def plain(self) -> None:
        """A joint training step."""
        self.optimizer.zero_grad()
        self.total().backward()
        self.optimizer.step()

    def passes(self) -> None:
        """A joint step with a backward pass for each task: what nothing that sees each task's gradient can undercut."""
        self.optimizer.zero_grad()
        losses = list(self.losses().values())
        for loss in losses:
            loss.backward(retain_graph=loss is not losses[-1])
        self.optimizer.step()

    def profiled(self, **options: Any) -> Step:
        """A profiled one."""
        profiler = recon.Profiler(self.model, **options)

        def step() -> None:
            self.optimizer.zero_grad()
            profiler.backward(self.losses())
            self.optimizer.step()

        return step

    def floored(self, every: int, **options: Any) -> Step:
        """So many profiled steps, the first of them with a noise floor, taken as `recon.profile` does."""
        profiler = recon.Profiler(self.model, **options)

        def steps() -> None:
            with state_kept(self.model), global_states_kept():
                scatter_global_states()
                profiler.floor_of_next_step(self.losses())
            for _ in range(every):
                self.optimizer.zero_grad()
                profiler.backward(self.losses())
                self.optimizer.step()

        return steps


def resnet_case(tasks: int, device: str) -> Case:
    """ResNet-18 on a batch of 64 noise images."""
    model = ResNet18(tasks)
    return Case(model, torch.randn(64, 1, 36, 36), {t: torch.randint(10, (64,)) for t in model.heads}, device)


def digits_case(device: str) -> Case:
    """The demo's model and one batch."""
    problem = get("digits")
    x, targets = next(iter(problem.make_loaders(0)[0]))
    return Case(problem.make_model(), x, dict(targets), device)


def mlp_case(tasks: int, device: str) -> Case:
    """A small network with many heads, in which a backward pass is mostly overhead."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
            self.heads = nn.ModuleDict({f"task{i}": nn.Linear(128, 2) for i in range(tasks)})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.trunk(x)
            return {task: head(features) for task, head in self.heads.items()}

    model = MLP()
    return Case(model, torch.randn(128, 256), {t: torch.randint(2, (128,)) for t in model.heads}, device)


def repeated(step: Step, times: int) -> Step:
    """Several steps in one."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def print_steps(device: str, rounds: int) -> None:
    """The profiled step against the plain one; and what the noise floor adds to a profile."""
    floor = floor_steps("auto") or 1
    columns = ("tasks", "plain ms", "profiled ms", "ratio", "T backwards", "bound", "sketched", "every 4", "with floor")
    print(f"{'step':<20}" + "".join(f"{column:>13}" for column in columns))
    for name, case, repeats in (
        ("digits, batch 128", digits_case(device), 20 * rounds),  # short steps: their times scatter more
        ("ResNet-18, batch 64", resnet_case(2, device), rounds),
        ("ResNet-18, batch 64", resnet_case(3, device), rounds),
    ):
        steps: dict[str, Callable[[], object]] = {
            "plain": case.plain,
            "T backwards": case.passes,
            "profiled": case.profiled(),
            "sketched": case.profiled(memory="sketch"),
            "every 4": repeated(case.profiled(every=4), 4),
        }
        seconds = step_seconds(steps, repeats)
        # Of many steps each, so in fewer rounds.
        profiles = {"without": repeated(case.profiled(), floor), "with": case.floored(floor)}
        seconds |= step_seconds(profiles, max(3, repeats // floor))
        tasks, plain = len(case.targets), seconds["plain"]
        times = (f"{1000 * plain:.1f}", f"{1000 * seconds['profiled']:.1f}")
        ratios = (
            seconds["profiled"] / plain,
            seconds["T backwards"] / plain,
            (1 + 2 * tasks) / 3,
            seconds["sketched"] / plain,
            seconds["every 4"] / plain / 4,
            seconds["with"] / seconds["without"],
        )
        cells = (str(tasks), *times, *(f"{ratio:.2f}" for ratio in ratios))
        print(f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells))


def print_many_tasks(device: str, rounds: int) -> None:
    """Forty tasks: against forty backward passes, and the share of the statistics."""
    case = resnet_case(MANY, device)
    profiler = recon.Profiler(case.model)
    state: dict[str, Any] = {"jacobian": task_jacobian(case.losses(), profiler.parameters, profiler.workspace)}

    def forward() -> None:
        state["loss"] = case.total()

    def forward_and_backward() -> None:
        case.optimizer.zero_grad()
        case.total().backward()

    def profiled() -> None:
        case.optimizer.zero_grad()
        profiler.backward(case.losses())

    seconds = step_seconds(
        {
            # As long as the other two, so that changes of the machine's speed affect all three alike.
            "forward": repeated(forward, PLAIN),
            "forward and backward": repeated(forward_and_backward, PLAIN),
            "profiled": profiled,
            "statistics": lambda: profiler.observe(state["jacobian"]),
        },
        rounds,
    )
    backward = (seconds["forward and backward"] - seconds["forward"]) / PLAIN
    print(
        f"ResNet-18, {MANY} tasks: a profiled step takes {seconds['profiled']:.2f} s, "
        f"{seconds['profiled'] / (MANY * backward):.2f} x {MANY} plain backward passes of {1000 * backward:.0f} ms; "
        f"the pair statistics are {100 * seconds['statistics'] / seconds['profiled']:.1f} % of it"
    )


def print_batched(device: str, rounds: int) -> None:
    """One pass for all tasks at once (vmap) against one pass a task, which is what recon does."""
    for name, case in (
        (f"MLP, {MANY} tasks", mlp_case(MANY, device)),
        ("digits, 2 tasks", digits_case(device)),
        ("ResNet-18, 3 tasks", resnet_case(3, device)),
    ):
        losses = case.losses()
        reach = find_reach(losses, case.model.parameters())
        parameters = list(case.model.parameters())
        rows = list(torch.eye(len(losses), device=device))

        def one_by_one(losses: dict[str, Tensor] = losses, reach: Any = reach) -> None:
            for task, loss in losses.items():
                torch.autograd.grad(loss, reach.parameters[task], retain_graph=True)

        def batched(losses: dict[str, Tensor] = losses, parameters: Any = parameters, rows: Any = rows) -> None:
            torch.autograd.grad(list(losses.values()), parameters, rows, retain_graph=True, is_grads_batched=True)

        seconds = step_seconds({"one by one": one_by_one, "batched": batched}, rounds)
        print(
            f"batched (vmap) against one backward pass a task, {name}: {seconds['batched'] / seconds['one by one']:.2f}"
        )


def print_memory(device: str) -> None:
    """Peak memory of a step, above what is held before it."""
    for tasks in (2, 3, 8):
        peaks = {}
        for name in ("plain", "exact", "sketch"):
            case = resnet_case(tasks, device)
            shared = sum(p.numel() for p in case.model.parameters()) * 4 / 2**20
            step = case.plain if name == "plain" else case.profiled(memory=name)
            peaks[name], _ = held_megabytes(step)  # the first step's: what the profiler keeps from then on counts too
        exact, sketch = ((peaks[name] - peaks["plain"]) / shared for name in ("exact", "sketch"))
        print(
            f"peak memory of a step, ResNet-18, {tasks} tasks: plain {peaks['plain']:.0f} MB; more with a profiler, in "
            f"shared parameters: {exact:.2f} exact (at most {1.1 * tasks:.1f}), {sketch:.2f} sketched"
        )


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
    print_steps(args.device, args.rounds)
    print_many_tasks(args.device, max(3, args.rounds // 5))
    print_batched(args.device, args.rounds)
    print_memory(args.device)


if __name__ == "__main__":
    main()
