"""Batches straight from tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from recon.errors import ProblemError
from recon.support.loaders import all_inner_loaders

RESIDENT = 1 / 4
"""The part of a GPU's free memory that a data set may fill."""


class TensorBatches(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """A labelled data set in memory, read a whole batch at a time: `inputs` and each task's targets are `(N, ...)`.

    Collating sample by sample costs more than a small network's training step; one index into each tensor
    costs next to nothing. `transform` makes a batch of inputs from what is stored: floats from bytes, say, which need a
    quarter of the memory; `target_transform` does so for each task's batch of targets.
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
                    f"Task {task!r} has {len(target)} targets for {len(inputs)} inputs; it must have one for each."
                )
        self.inputs = inputs
        self.targets = dict(targets)
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        # A list would be copied to the device for every tensor; this is copied once.
        chosen = torch.as_tensor(indices).to(self.inputs.device, non_blocking=True)
        inputs = self.inputs[chosen]
        inputs = inputs if self.transform is None else self.transform(inputs)
        targets = {task: target[chosen] for task, target in self.targets.items()}
        if self.target_transform is not None:
            targets = {task: self.target_transform(target) for task, target in targets.items()}
        return inputs, targets

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.inputs, *self.targets.values()))

    def to(self, device: torch.device | str) -> TensorBatches:
        """Move the tensors to a device, in place; the batches are made there, of the same samples in the same order."""
        self.inputs = self.inputs.to(device)
        self.targets = {task: target.to(device) for task, target in self.targets.items()}
        return self


Loader = DataLoader[tuple[Tensor, dict[str, Tensor]]]

Splits = tuple[TensorBatches, TensorBatches]
"""What a problem trains on, and what it tests on."""


def loaders_of(
    read: Callable[[], Splits], batch_size: int, test_batch_size: int
) -> Callable[[int], tuple[Loader, Loader]]:
    """A problem's `make_loaders`, which calls `read` once: a run asks for loaders several times."""
    data = cache(read)

    def make_loaders(seed: int) -> tuple[Loader, Loader]:
        train, test = data()
        return shuffled(train, batch_size, seed), in_order(test, test_batch_size)

    return make_loaders


def shuffled(dataset: TensorBatches, batch_size: int, seed: int) -> Loader:
    """Shuffled batches of equal size; the last, smaller one is dropped.

    Every pass has a new order, and the same seed replays the same sequence of passes. All random numbers come from
    `loader.generator`: restoring its state between two passes resumes the sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    return _loader(dataset, RandomSampler(dataset, generator=generator), batch_size, generator, drop_last=True)


def in_order(dataset: TensorBatches, batch_size: int) -> Loader:
    """Every sample once, in order."""
    return _loader(dataset, SequentialSampler(dataset), batch_size, torch.Generator(), drop_last=False)


def prepare(loader: object, device: torch.device) -> None:
    """Make a data loader feed a GPU without waiting for copies; the order of its batches stays.

    `TensorBatches` that fit (`RESIDENT`) move there for good. Others, and whatever workers load, come in pinned memory.
    Of a loader that draws from others, those are prepared. Loaders of another kind stay as they are, and so do all of
    them on other devices than GPUs.
    """
    for inner in all_inner_loaders(loader).values():
        _prepare_one(inner, device)
    _prepare_one(loader, device)


def _prepare_one(loader: object, device: torch.device) -> None:
    free = free_memory(device)
    if free is None or not isinstance(loader, DataLoader):
        return
    data = loader.dataset
    if loader.num_workers:  # other processes, which cannot read the GPU's memory
        loader.pin_memory = True
    elif isinstance(data, TensorBatches):
        if data.inputs.device.type == device.type or data.nbytes <= RESIDENT * free:
            data.to(device)
        else:
            loader.pin_memory = True


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for another device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _loader(
    dataset: TensorBatches, sampler: Sampler[int], batch_size: int, generator: torch.Generator, drop_last: bool
) -> Loader:
    # Without a generator of its own, each pass of a DataLoader draws from torch's global one, and a run that
    # evaluates would train differently from one that does not.
    batches = BatchSampler(sampler, batch_size, drop_last)
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)
