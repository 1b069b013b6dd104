"""Batches straight from tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from recon.errors import ProblemError


class TensorBatches(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """A labelled data set in memory, read a whole batch at a time.

    Collating sample by sample costs more than a small network's training step; one index into each tensor
    costs next to nothing.

    Args:
        inputs: `(N, ...)`.
        targets: `{task name: (N, ...)}`.
        transform: what makes a batch of inputs of what is stored: floats of bytes, say, which take a quarter of the
            memory.
        target_transform: the same for each task's batch of targets.

    Raises:
        ProblemError: a task has more or fewer targets than there are inputs.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Mapping[str, Tensor],
        transform: Callable[[Tensor], Tensor] | None = None,
        target_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for task, target in targets.items():
            if len(target) != len(inputs):
                raise ProblemError(
                    f"Task {task!r} has {len(target)} targets for {len(inputs)} inputs; expected one each."
                )
        self.inputs = inputs
        self.targets = dict(targets)
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.inputs[indices]
        inputs = inputs if self.transform is None else self.transform(inputs)
        targets = {task: target[indices] for task, target in self.targets.items()}
        if self.target_transform is not None:
            targets = {task: self.target_transform(target) for task, target in targets.items()}
        return inputs, targets


def shuffled(dataset: TensorBatches, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
    """Shuffled batches of equal size; the last, smaller one is dropped.

    Every pass has a new order, and the same seed replays the same sequence of passes. All of the loader's
    chance is in `loader.generator`: restoring its state between two passes resumes the sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    return _loader(dataset, RandomSampler(dataset, generator=generator), batch_size, generator, drop_last=True)


def in_order(dataset: TensorBatches, batch_size: int) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
    """Every sample once, in order."""
    return _loader(dataset, SequentialSampler(dataset), batch_size, torch.Generator(), drop_last=False)


def _loader(
    dataset: TensorBatches,
    sampler: Sampler[int],
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool,
) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
    # Without a generator of its own, each pass of a DataLoader draws from torch's global one, and a run that
    # evaluates would train differently from one that does not.
    batches = BatchSampler(sampler, batch_size, drop_last)
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)
