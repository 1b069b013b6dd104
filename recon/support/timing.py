"""Measure step times that can be compared: in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def step_seconds(steps: Mapping[str, Callable[[], object]], rounds: int = 15, warm_up: int = 3) -> dict[str, float]:
    """The median seconds of each callable, called in turn, so that a machine's drifting speed hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
