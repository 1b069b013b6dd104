"""Batches of samples that are read from files one by one, by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from recon.errors import ProblemError

Key = tuple[int, bool]
"""Which sample, and whether to mirror it."""

_WORTH_A_WORKER = 8  # batches: a worker takes as long to start


class Mirrored(Sampler[Key]):
    """Every sample once, in random order, half of them mirrored.

    One generator in the main process draws everything, so that neither the number of workers nor an interruption
    changes the batches.
    """

    def __init__(self, samples: Sized, generator: torch.Generator) -> None:
        self.samples, self.generator = samples, generator

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Key]:
        order = torch.randperm(len(self), generator=self.generator)
        mirrored = torch.rand(len(self), generator=self.generator) < 0.5
        return zip(order.tolist(), mirrored.tolist(), strict=True)


class FileLoader(DataLoader):
    """Batches of a data set whose samples are found by `Key`: `collate` makes one of a list of samples.

    With a seed, which is for training, the order is random, half of the samples are mirrored, and a smaller batch at
    the end is dropped; with None, the samples come in order and as they are. `workers` processes read them: by default
    as many as there are processors, or none for few batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int | None,
        workers: int | None = None,
    ) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        if workers is None:
            workers = min(_processors(), count // (_WORTH_A_WORKER * batch_size))
        generator = torch.Generator().manual_seed(seed or 0)
        super().__init__(
            dataset,
            batch_size,
            sampler=[(index, False) for index in range(count)] if seed is None else Mirrored(dataset, generator),  # type: ignore[arg-type]
            drop_last=seed is not None,
            collate_fn=collate,
            generator=generator,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ProblemError as error:
            # A worker process sends its whole traceback, with the error in the last line.
            last = str(error).strip().splitlines()[-1]
            raise ProblemError(last.removeprefix(f"{ProblemError.__module__}.{ProblemError.__name__}: ")) from error


def _processors() -> int:
    """How many this process may use, where the system says so: a container can have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
