"""What the fan costs: a branched network's step against the same network written by hand, and against the plain one.

    python benchmarks/branched_step.py           # ResNet-18, 1x36x36, batch 64; all norms and five early convolutions
    python benchmarks/branched_step.py --rounds 30 --device cuda

The plan branches at the stem, so everything runs once per task: the multiply-adds double. The optimizer's step does
not, since most parameters stay shared: `floor` is the ratio to the plain step if everything else doubles.
Last, what converting a ResNet-50 takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from networks import HandBranchedResNet18, ResNet18, ResNet50
from profile_step import held_megabytes
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import recon
from recon.support.timing import step_seconds

TASKS = ("task0", "task1")
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD, momentum 0.9": lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "Adam": lambda model: Adam(model.parameters(), lr=1e-4),
}


def early_plan(model: nn.Module) -> recon.BranchPlan:
    """All norms, the stem and the four convolutions of layer1, per task."""
    convs = ("backbone.conv1", "backbone.layer1.")
    return recon.BranchPlan.per_task(
        [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.Conv2d) and name.startswith(convs))
        ],
        TASKS,
    )


def total_loss(out: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """The sum of the tasks' cross entropies."""
    return torch.stack([F.cross_entropy(out[task], target) for task, target in targets.items()]).sum()


def check_same(hand: nn.Module, fan: nn.Module, x: Tensor, targets: Mapping[str, Tensor]) -> None:
    """Load the fan's weights into the hand-written network; fail unless a training step gives the same in both.

    Compared are the outputs, the gradients and the running statistics.
    """
    name_of = {name: name.replace(".branches.task", ".") for name in fan.state_dict()}
    hand.load_state_dict({name_of[name]: value for name, value in fan.state_dict().items()})
    found = []
    for model in (hand, fan):
        out = model(x)
        total_loss(out, targets).backward()
        values = {f"output of {task}": out[task] for task in TASKS}
        values |= {f"gradient of {name_of.get(name, name)}": p.grad for name, p in model.named_parameters()}
        values |= {name_of.get(name, name): buffer for name, buffer in model.named_buffers()}
        found.append(values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)  # the error names what differs
    equal = sum(torch.equal(found[1][name], expected) for name, expected in found[0].items())
    print(f"fan and hand-written network: {equal} of {len(found[0])} outputs, gradients, statistics equal to the bit")


def step_of(model: nn.Module, optimizer: Optimizer, x: Tensor, targets: Mapping[str, Tensor]) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        optimizer.zero_grad()
        total_loss(model(x), targets).backward()
        optimizer.step()

    return step


def compare_steps(device: str, rounds: int) -> None:
    """Print step times of the plain, the hand-written and the converted ResNet-18."""
    x = torch.randn(64, 1, 36, 36, device=device)
    targets = {task: torch.randint(10, (64,), device=device) for task in TASKS}
    plain, hand = ResNet18(len(TASKS)).to(device), HandBranchedResNet18(len(TASKS)).to(device)
    plan = early_plan(plain)
    fan = recon.convert(plain, plan, x[:2])
    check_same(hand, fan, x, targets)
    before, after = recon.costs(plain, None, x), recon.costs(fan, None, x)
    print(f"multiply-adds {before.macs / 1e9:.2f} G -> {after.macs / 1e9:.2f} G, {after.macs / before.macs:.2f} ×")
    print(
        f"parameters {before.parameters / 1e6:.2f} M -> {after.parameters / 1e6:.2f} M, "
        f"{after.parameters / before.parameters:.3f} ×"
    )
    print(
        f"{'optimizer':<19}{'plain ms':>10}{'hand ms':>10}{'fan ms':>10}{'fan/hand':>10}{'hand/plain':>12}"
        f"{'fan/plain':>11}{'floor':>8}"
    )
    for name, make in OPTIMIZERS.items():
        models = {"plain": plain, "hand": hand, "fan": fan}
        optimizers = {which: make(model) for which, model in models.items()}
        steps: dict[str, Callable[[], object]] = {
            which: step_of(model, optimizers[which], x, targets) for which, model in models.items()
        }
        seconds = step_seconds({**steps, "optimizer": optimizers["plain"].step}, rounds)
        ms = {which: 1000 * value for which, value in seconds.items()}
        floor = 2 - ms["optimizer"] / ms["plain"]
        print(
            f"{name:<19}{ms['plain']:>10.1f}{ms['hand']:>10.1f}{ms['fan']:>10.1f}{ms['fan'] / ms['hand']:>10.3f}"
            f"{ms['hand'] / ms['plain']:>12.3f}{ms['fan'] / ms['plain']:>11.3f}{floor:>8.3f}"
        )


def compare_conversions(device: str) -> None:
    """Print seconds and memory of converting ResNet-50, all convolutions and norms per task.

    The memory beyond the new copies goes to the dry forwards: one training forward of the result takes as much.
    """
    model: nn.Module = ResNet50(len(TASKS)).to(device)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    plan = recon.BranchPlan.per_task(layers, TASKS)
    print(f"converting ResNet-50{'MB of the':>24}{'MB beyond the copies':>24}{'MB of a training':>20}")
    print(f"{'2 images of':<22}{'seconds':>9}{'copies':>13}{'peak':>12}{'kept':>12}{'forward':>20}")
    for size in (64, 224):
        x = torch.randn(2, 3, size, size, device=device)
        results: list[nn.Module] = []

        def convert(x: Tensor = x, results: list[nn.Module] = results) -> None:
            results.append(recon.convert(model, plan, x))

        seconds = step_seconds({"convert": convert, "drop": results.clear}, rounds=3, warm_up=1)["convert"]
        peak, kept = held_megabytes(convert)
        branched = results[-1].train()
        copies = sum(state.nbytes for state in [*branched.parameters(), *branched.buffers()]) / 2**20
        forward, _ = held_megabytes(partial(branched, x))
        print(
            f"{f'{size}x{size}':<22}{seconds:>9.2f}{copies:>13.0f}{peak - copies:>12.0f}{kept - copies:>12.1f}"
            f"{forward:>20.0f}"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"ResNet-18, two tasks, batch 64, {torch.get_num_threads()} threads")
    compare_steps(args.device, args.rounds)
    compare_conversions(args.device)


if __name__ == "__main__":
    main()
