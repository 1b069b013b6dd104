"""What a training step costs with each gradient method: time and peak memory against a plain joint step, in one run.

    python benchmarks/method_step.py             # ResNet-18, 1x36x36, batch 64, two tasks; every method
    python benchmarks/method_step.py --methods pcgrad cagrad:c=0.5 --rounds 30

The steps alternate, so that a machine's drifting speed hits all alike. Methods that see each task's gradient take a
backward pass for each, and no less than (1 + 2 T) / 3 of a plain step if a backward pass takes twice as long as a
forward one. Memory is counted above plain training's, in copies of the shared parameters.
"""

from __future__ import annotations

import argparse

import torch
from profile_step import Case, Step, held_megabytes, resnet_case

import recon
from recon.methods import FeatureMethod, Weighting
from recon.support.timing import step_seconds

TASKS = 2
TIME_BARS = {"pcgrad": 1.85, "cagrad": 1.85, "mgda": 1.85, "graddrop": 2.2, "gradnorm": 1.85}
WEIGHTING_BAR = 1.05
MEMORY_BAR = 1.1 * TASKS
PUBLISHED = {"pcgrad": 3.3, "cagrad": 3.0, "mgda": 2.4, "graddrop": 4.2}
"""The same ratio of the code published with Recon."""


def method_step(case: Case, text: str) -> Step:
    """A training step with a method, given as on the command line."""
    method = recon.methods.parse(text)
    method.setup(tuple(case.targets))
    method.to(case.device)
    method.attach(case.model)
    own = list(method.parameters())
    if own:
        case.optimizer.add_param_group({"params": own})

    def step() -> None:
        case.optimizer.zero_grad()
        recon.backward(case.losses(), case.model, method)
        case.optimizer.step()
        if method.needs_new_losses:
            with torch.no_grad():
                method.after_step(case.losses())

    return step


def time_ratios(methods: list[str], device: str, rounds: int) -> tuple[float, dict[str, float]]:
    """The seconds of a plain step, and each method's step in plain ones."""
    case = resnet_case(TASKS, device)
    steps: dict[str, Step] = {"": case.plain}
    for text in methods:
        # What lives inside a model would change the other methods' steps.
        inside = isinstance(recon.methods.parse(text), FeatureMethod)
        steps[text] = method_step(resnet_case(TASKS, device) if inside else case, text)
    seconds = step_seconds(steps, rounds)
    return seconds[""], {text: seconds[text] / seconds[""] for text in methods}


def extra_memory(methods: list[str], device: str) -> dict[str, float]:
    """Peak memory of each method's first step above that of a plain one, in copies of the shared parameters."""
    peaks: dict[str, float] = {}
    shared = 1.0
    for text in ("", *methods):
        case = resnet_case(TASKS, device)
        shared = sum(p.numel() * p.element_size() for p in case.model.get_submodule("backbone").parameters()) / 2**20
        peaks[text], _ = held_megabytes(method_step(case, text) if text else case.plain)
    return {text: (peaks[text] - peaks[""]) / shared for text in methods}


def time_bar(text: str) -> float | None:
    """What a method's step should take at most, in plain steps."""
    name = text.partition(":")[0]
    return TIME_BARS.get(name, WEIGHTING_BAR if isinstance(recon.methods.parse(text), Weighting) else None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=recon.methods.names(), metavar="METHOD", help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    plain, ratios = time_ratios(args.methods, args.device, args.rounds)
    memory = extra_memory(args.methods, args.device)
    print(f"ResNet-18, 1x36x36, batch 64, {TASKS} tasks: a plain joint step takes {1000 * plain:.1f} ms")
    columns = ("time ratio", "at most", "published", "memory", "at most")
    print(f"{'method':<20}" + "".join(f"{column:>12}" for column in columns))
    for text in args.methods:
        bar, published = time_bar(text), PUBLISHED.get(text.partition(":")[0])
        cells = (ratios[text], bar, published, memory[text], MEMORY_BAR)
        print(f"{text:<20}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>12}" for cell in cells))


if __name__ == "__main__":
    main()
