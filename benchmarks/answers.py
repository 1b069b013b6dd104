"""How long the commands and solvers take that should answer at once, relative to a lower bound.

    python benchmarks/answers.py

`recon --help` against a Python that does nothing; `recon plan` of the shipped ResNet-18 map against importing
PyTorch; the weights of forty tasks against one eigendecomposition of their Gramian. Both of a pair run in turn, so that
a machine's drifting speed hits both alike.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from recon import methods

MAP = Path(__file__).parent.parent / "artifacts" / "multi-fashion-mnist-resnet18.json"
TASKS = 40


def ratio(one: Callable[[], object], unit: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of `one`, and the median of its ratio to `unit`."""
    pairs = [(_seconds(one), _seconds(unit)) for _ in range(rounds)]
    return median(pair[0] for pair in pairs), median(a / b for a, b in pairs)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def python(*arguments: str) -> Callable[[], object]:
    """A process of this Python."""
    return lambda: subprocess.run([sys.executable, *arguments], capture_output=True, check=True)


def empty_data(folder: Path) -> Path:
    """The files of Multi-Fashion-MNIST, with nothing in them: a plan looks only whether they are there."""
    for source in ("MNIST", "FashionMNIST"):
        (folder / source / "raw").mkdir(parents=True)
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (folder / source / "raw" / f"{name}-ubyte").touch()
    return folder


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    J = torch.randn(TASKS, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = J @ J.T
    with tempfile.TemporaryDirectory() as folder:
        data = str(empty_data(Path(folder)))
        line = ["-m", "recon_cli", "plan", "multi-fashion-mnist", "--data-root", data, "--map", str(MAP)]
        rows = {"recon --help / python -c pass": (python("-m", "recon_cli", "--help"), python("-c", "pass"), 9)}
        rows["recon plan / import torch"] = (python(*line, "--max-macs", "1.25"), python("-c", "import torch"), 3)
        for name in ("nash-mtl", "fairgrad", "upgrad", "cagrad", "mgda", "pe-ltr"):
            method = methods.get(name)
            assert isinstance(method, methods.GramianAggregator)
            rows[f"{name}, {TASKS} tasks / eigh"] = (partial(method.weights, G), partial(torch.linalg.eigh, G), 21)
        print(f"{'':<36}{'seconds':>10}{'ratio':>10}")
        for title, (one, unit, rounds) in rows.items():
            seconds, times = ratio(one, unit, rounds)
            print(f"{title:<36}{seconds:>10.4f}{times:>10.1f}")


if __name__ == "__main__":
    main()
