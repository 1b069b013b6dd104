"""Multi-Fashion+MNIST on one GPU in ten minutes: joint training and PCGrad, each plain and with Recon's top 25 layers.

    python benchmarks/gpu_multi_fashion_mnist.py --data-root DATA --out gpu.json          # float32
    python benchmarks/gpu_multi_fashion_mnist.py --data-root DATA --out bf16.json --amp   # bf16, and one run in float32

Anywhere, to see that it works: --train-samples 256 --epochs 1 --seeds 1.

Network, optimizer, batches and schedule are the paper's (SGD 0.1, momentum 0.9, a tenth after a half and after three
quarters, batches of 256), except the number of epochs: the paper's 120, or as many as fit into `--minutes`, by a few
steps of each variant that are timed first. (Convolutions in float32 take TF32 where the GPU has it: PyTorch's own
setting.) The layers are the first 25 of the conflict map that ships with the
project. Every run is kept in the file as soon as it is done, and is not done again: the same call goes on with the
length that was chosen first. Step times are those of the runs, loading included, without their first epoch if there
are more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import recon
from recon import problems
from recon.experiments.inputs import choose_device, example_inputs, make_model
from recon.problems.problem import Problem
from recon.support.files.whole import write_text
from recon.support.tables import text_table
from recon.training.precision import Amp

PAPER_EPOCHS, TOP_K = 120, 25
MAP = Path(__file__).parents[1] / "artifacts" / "multi-fashion-mnist-resnet18.json"
WARM_UP, TIMED = 10, 30  # steps
MARGIN = 0.92  # of the time that is left: evaluation, and steps that are slower than the timed ones


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        method: what makes the update.
        branched: whether the top layers have a copy for each task.
        amp: what the forward is computed in; float32 if None.
        seeds: of its runs.
    """

    method: str
    branched: bool
    amp: Amp | None
    seeds: int

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.method}{' + Recon' if self.branched else ''}, {self.amp or 'float32'}"


def variants(seeds: int, amp: Amp | None) -> list[Variant]:
    """Plain joint training first; with mixed precision, one run of it without in the end."""
    all_seeds = [Variant(method, branched, amp, seeds) for method in ("joint", "pcgrad") for branched in (False, True)]
    return all_seeds if amp is None else [*all_seeds, Variant("joint", False, None, 1)]


class Bench:
    """Trains variants of one problem on one device.

    Args:
        problem: the problem; its data move to the device once, as bytes.
        map_path: the conflict map that ranks the layers.
        device: where to train.
    """

    def __init__(self, problem: Problem, map_path: Path, device: torch.device) -> None:
        self.problem, self.device = problem, device
        example = example_inputs(problem, 0)
        cmap = recon.ConflictMap.load(map_path)
        plan = recon.plan(cmap, problem.make_model(), top_k=TOP_K)
        self.branch: Callable[[nn.Module], nn.Module] = lambda model: recon.convert(model, plan, example)
        for loader in problem.make_loaders(0):  # the loaders of all seeds share their data sets
            loader.dataset.to(device)  # type: ignore[attr-defined]

    def train(
        self, variant: Variant, seed: int, epochs: int, stop: Callable[[], bool] | None = None
    ) -> tuple[nn.Module, recon.History]:
        """A model of this seed, trained for so many epochs, or until told to stop."""
        model = make_model(self.problem, seed)
        model = (self.branch(model) if variant.branched else model).to(self.device)
        train, _ = self.problem.make_loaders(seed)
        optimizer = self.problem.make_optimizer(model.parameters())
        assert self.problem.make_scheduler is not None
        history = recon.train(
            model,
            train,
            self.problem.losses,
            optimizer=optimizer,
            scheduler=self.problem.make_scheduler(optimizer, epochs * len(train)),  # type: ignore[arg-type]
            method=variant.method,
            amp=variant.amp,
            epochs=epochs,
            stop=stop,
        )
        return model, history

    def run(self, variant: Variant, seed: int, epochs: int) -> dict[str, Any]:
        """What a whole training came to."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        model, history = self.train(variant, seed, epochs)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        results = recon.evaluate(model, self.problem.make_loaders(seed)[1], self.problem.tasks)
        timed = history.epochs[1:] or history.epochs
        return {
            "accuracy": {task: metrics["accuracy"] for task, metrics in results.items()},
            "seconds_per_step": sum(epoch.seconds for epoch in timed) / sum(epoch.steps for epoch in timed),
            "peak_bytes": peak,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_losses": history.epochs[-1].losses,
        }

    def seconds_per_step(self, variant: Variant) -> float:
        """Of a few steps."""
        clock = Clock(self.device)
        self.train(variant, 0, PAPER_EPOCHS, stop=clock)
        return clock.seconds / TIMED


class Clock:
    """Times the steps after a few, and then ends the training."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = 0
        self.start = self.seconds = 0.0

    def __call__(self) -> bool:
        """To be called after each step."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.start = self._now()
        if self.steps == WARM_UP + TIMED:
            self.seconds = self._now() - self.start
        return self.steps == WARM_UP + TIMED

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def epochs_that_fit(bench: Bench, wanted: Sequence[Variant], seconds: float, started: float) -> int:
    """As much of the paper's schedule as fits into the seconds since `started`.

    Args:
        bench: what trains.
        wanted: the variants, each with its seeds.
        seconds: for everything.
        started: on the clock of `time.monotonic`.
    """
    per_step = {variant: bench.seconds_per_step(variant) for variant in wanted}
    for variant, one in per_step.items():
        print(f"{variant.label}: {1000 * one:.1f} ms a step", file=sys.stderr)
    steps = len(bench.problem.make_loaders(0)[0])  # type: ignore[arg-type]
    per_epoch = steps * sum(variant.seeds * one for variant, one in per_step.items())
    left = MARGIN * (seconds - (time.monotonic() - started))
    return max(1, min(PAPER_EPOCHS, int(left / per_epoch)))


def table(wanted: Sequence[Variant], runs: dict[str, Any]) -> str:
    """A line for each variant that has a run: the mean over its seeds, and each in brackets."""
    done = {v: [runs[key] for key in (_key(v, seed) for seed in range(v.seeds)) if key in runs] for v in wanted}
    done = {variant: some for variant, some in done.items() if some}
    plain = fmean(run["seconds_per_step"] for run in next(iter(done.values())))
    tasks = list(next(iter(done.values()))[0]["accuracy"])
    header = ["", *tasks, "mean accuracy", "ms a step", "ratio", "parameters", "peak memory"]
    rows = []
    for variant, some in done.items():
        columns = [[run["accuracy"][task] for run in some] for task in tasks]
        columns.append([fmean(run["accuracy"].values()) for run in some])
        seconds = fmean(run["seconds_per_step"] for run in some)
        peaks = [run["peak_bytes"] for run in some if run["peak_bytes"] is not None]
        memory = f"{max(peaks) / 2**30:.2f} GiB" if peaks else "-"
        costs = [f"{1000 * seconds:.1f}", f"{seconds / plain:.2f}", f"{some[0]['parameters']:,}", memory]
        rows.append([variant.label, *map(_percent, columns), *costs])
    return text_table(header, rows)


def precision_line(wanted: Sequence[Variant], runs: dict[str, Any]) -> str:
    """Whether mixed precision changed the accuracy: the first variant and its run without, of one seed."""
    mixed, plain = (fmean(runs[_key(variant, 0)]["accuracy"].values()) for variant in (wanted[0], wanted[-1]))
    return (
        f"{wanted[0].label}: {100 * mixed:.2f} % mean accuracy at seed 0; {wanted[-1].label}: {100 * plain:.2f} %, a "
        f"difference of {100 * (mixed - plain):+.2f} points"
    )


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.2f} % ({', '.join(f'{100 * value:.2f}' for value in values)})"


def _key(variant: Variant, seed: int) -> str:
    return f"{variant.label}, seed {seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing in the file, and print the table."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    parser.add_argument("--minutes", type=float, default=10, help="for everything (default: 10)")
    parser.add_argument("--epochs", type=int, help="of every training, however long it takes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train-samples", type=int)
    parser.add_argument("--amp", action="store_true", help="compute the forward in bf16; one run without, to compare")
    parser.add_argument("--map", type=Path, default=MAP, help="the conflict map (default: the project's)")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    args = parser.parse_args(arguments)

    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True  # all batches have one size
    problem = problems.get("multi-fashion-mnist", data_root=args.data_root, train_samples=args.train_samples)
    bench = Bench(problem, args.map, device)
    wanted = variants(args.seeds, "bf16" if args.amp else None)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    settings = {"train_samples": args.train_samples, "seeds": args.seeds, "amp": args.amp, "device": hardware}

    data: dict[str, Any]
    data = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "runs": {}}
    if data["settings"] != settings or args.epochs not in (None, data.get("epochs", args.epochs)):
        sys.exit(
            f"{args.out} holds {data.get('epochs')} epochs with {data['settings']}, not this. Choose another --out."
        )
    if "epochs" not in data:
        data["epochs"] = args.epochs or epochs_that_fit(bench, wanted, 60 * args.minutes, started)
    print(f"{hardware}, torch {torch.__version__}: {data['epochs']} of the paper's {PAPER_EPOCHS} epochs", flush=True)
    for variant in wanted:
        for seed in range(variant.seeds):
            key = _key(variant, seed)
            if key not in data["runs"]:
                data["runs"][key] = bench.run(variant, seed, data["epochs"])
                write_text(args.out, json.dumps(data, indent=1) + "\n")
                print(f"{key}: done after {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(table(wanted, data["runs"]))
    if args.amp:
        print(precision_line(wanted, data["runs"]))


if __name__ == "__main__":
    main()
