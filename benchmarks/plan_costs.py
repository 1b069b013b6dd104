"""What it takes to know what a plan costs: ResNet-18 (1x36x36, batch 8), for 2 and for 40 tasks.

    python benchmarks/plan_costs.py

Building the cost model traces two forwards, once; `of` then answers for a plan. `measured` is the way without it:
converting the model for the plan and counting while that runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from networks import ResNet18

import recon
from recon.branching.partition import Partition
from recon.plans.costing.cost_model import CostModel

PLANS = 200


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def random_plans(layers: list[str], tasks: tuple[str, ...]) -> list[dict[str, Partition]]:
    """Plans of all sizes, each layer per task or in two or three groups."""
    draw = random.Random(0)
    splits = [Partition.of_groups([tasks[i::n] for i in range(n)], tasks) for n in (2, min(3, len(tasks)), len(tasks))]
    return [
        {name: draw.choice(splits) for name in draw.sample(layers, draw.randint(1, len(layers)))} for _ in range(PLANS)
    ]


def print_costs(number: int) -> None:
    """A line for a number of tasks."""
    model, x = ResNet18(number), torch.randn(8, 1, 36, 36)
    tasks = tuple(f"task{i}" for i in range(number))
    cost_model = CostModel(model, tasks, x)
    plans = random_plans([name for name in cost_model.layers if name.startswith("backbone")], tasks)
    build = median(seconds(lambda: CostModel(model, tasks, x)) for _ in range(5))
    of = median(seconds(partial(cost_model.of, plan)) for plan in plans)
    measured = seconds(lambda: recon.costs(recon.convert(model, recon.BranchPlan(tasks, plans[0]), x), None, x))
    print(f"{number:>5}{1000 * build:>7.0f} ms{1000 * of:>7.2f} ms{1000 * measured:>8.0f} ms")


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"{'tasks':>5}{'build':>10}{'of':>10}{'measured':>11}")
    for number in (2, 40):
        print_costs(number)


if __name__ == "__main__":
    main()
