"""What `until_stable` saves: where it would end a profile, and whether its top layers are the whole profile's.

    python benchmarks/until_stable.py                                             # digits, three seeds
    python benchmarks/until_stable.py multi-fashion-mnist --data-root DATA --train-samples 30000 --top-k 10 25

The whole profile runs once; a run that stops is its beginning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import recon
from recon import ConflictMap, problems
from recon.problems.problem import Problem
from recon.profiling.stability import StableRanking


class Watch:
    """Notes when each of several rankings is stable, and what its top layers are then.

    Args:
        profiler: of the run.
        top_k: the numbers of layers.
        overlap: to wait for.
        planned: the steps of the run.
    """

    def __init__(self, profiler: recon.Profiler, top_k: Sequence[int], overlap: float, planned: int) -> None:
        self.profiler = profiler
        self.planned = planned
        self.waiting = {k: StableRanking(overlap, k) for k in top_k}
        self.stopped: dict[int, tuple[int, list[str]]] = {}

    def look(self) -> bool:
        """To be called after each step; never stops the run."""
        for k, stable in list(self.waiting.items()):
            if stable.due(self.profiler.steps):
                cmap = self.profiler.conflict_map()
                if stable.check(cmap.series(), self.profiler.steps, bin_steps=cmap.bin_steps, planned=self.planned):
                    self.stopped[k] = self.profiler.steps, cmap.ranking()[:k]
                    del self.waiting[k]
        return False


def run(problem: Problem, seed: int, epochs: int, top_k: Sequence[int], overlap: float) -> tuple[ConflictMap, Watch]:
    """A whole profile of one seed."""
    torch.manual_seed(seed)
    model = problem.make_model()
    loader, _ = problem.make_loaders(seed)
    profiler = recon.Profiler(model, tasks=problem.task_names)
    watch = Watch(profiler, top_k, overlap, epochs * len(loader))  # type: ignore[arg-type]
    recon.train(
        model,
        loader,
        problem.losses,
        optimizer=problem.make_optimizer(model.parameters()),
        epochs=epochs,
        profiler=profiler,
        stop=watch.look,
    )
    return profiler.conflict_map(), watch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="?", default="digits")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--train-samples", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--top-k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--overlap", type=float, default=0.9)
    args = parser.parse_args()
    problem = problems.get(args.problem, data_root=args.data_root, train_samples=args.train_samples)
    print(f"{'problem':<22}{'seed':>5}{'K':>4}{'layers':>8}{'steps':>7}{'stops at':>10}{'saved':>7}{'Jaccard':>9}")
    for seed in range(args.seeds):
        cmap, watch = run(problem, seed, args.epochs, args.top_k, args.overlap)
        for k in args.top_k:
            whole, planned = set(cmap.ranking()[:k]), watch.planned
            steps, top = watch.stopped.get(k, (planned, list(whole)))
            jaccard = len(whole & set(top)) / len(whole | set(top))
            cells = f"{seed:>5}{k:>4}{len(cmap.layers):>8}{planned:>7}{steps:>10}"
            print(f"{problem.name:<22}{cells}{1 - steps / planned:>7.0%}{jaccard:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
