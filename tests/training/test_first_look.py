"""A look at a loader's first batches: what is seen, and that the training does not notice."""

import random

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import recon
from recon.errors import LoaderError
from recon.problems.loading import TensorBatches, shuffled
from recon.support.random_states import global_states
from recon.training.batches.first_look import first_batches


class Noisy(Dataset):
    """Samples changed from every source of chance, which remember how often they were asked for."""

    def __init__(self):
        self.own, self.asked, self.cache = np.random.default_rng(3), 0, {}

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.asked += 1
        self.cache[index] = self.asked
        noise = torch.rand(()) + random.random() + np.random.rand() + self.own.random() + self.asked
        return torch.tensor([index]) + noise, {"a": torch.tensor(index)}


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.rand(2) + i, {"a": torch.tensor(i)}) for i in range(12))


class Epochs:
    """A loader of one's own, each of whose epochs is another."""

    def __init__(self):
        self.epoch, self.lengths, self.generator = 0, [], torch.Generator().manual_seed(4)

    def __iter__(self):
        self.epoch += 1
        for number in range(5):
            self.lengths.append(number)
            yield torch.rand(2, generator=self.generator) + self.epoch + len(self.lengths), {"a": torch.ones(2)}


class Place:
    """A loader that says and finds its place itself; its iterator is out of reach."""

    def __init__(self):
        self.__iterator = iter(range(5))

    def state_dict(self):
        rest = list(self.__iterator)
        self.__iterator = iter(rest)
        return {"rest": rest}

    def load_state_dict(self, state):
        self.__iterator = iter(state["rest"])

    def __iter__(self):
        return ((torch.tensor([number]), {"a": torch.ones(1)}) for number in self.__iterator)


class Pairs:
    """A task's own loader: `(inputs, target)`."""

    def __init__(self, loader):
        self.loader, self.passes = loader, 0

    def __iter__(self):
        self.passes += 1
        return ((x + self.passes, targets["a"]) for x, targets in self.loader)


def weighted():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(torch.ones(12), 12, generator=generator))


def used_workers():
    loader = DataLoader(Noisy(), 4, num_workers=1, persistent_workers=True)
    values(loader)  # its workers now have random states of their own
    return loader


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(2)),
    "weighted": weighted,
    "several": lambda: DataLoader(ConcatDataset([Noisy(), Noisy()]), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "used-workers": used_workers,
    "tensors": lambda: shuffled(TensorBatches(torch.rand(12, 2), {"a": torch.rand(12)}), 4, seed=1),
    "epochs": Epochs,
    "joint": lambda: recon.joint_loader({"a": Epochs(), "b": Pairs(DataLoader(Noisy(), 4, shuffle=True))}, length=4),
    "place": Place,
    "list": lambda: [(torch.ones(2), {"a": torch.ones(2)})] * 3,
}


def values(batches):
    return [tree_map(lambda leaf: leaf.tolist(), batch) for batch in batches]


def made(name):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return LOADERS[name]()


@pytest.mark.parametrize("name", LOADERS)
def test_the_loader_gives_the_same_batches_as_if_nobody_had_looked(name):
    loader = made(name)
    expected = [values(loader), values(loader), torch.rand(3).tolist(), random.random(), np.random.rand()]
    loader = made(name)
    seen = values(first_batches(loader, 2))
    if name != "used-workers":  # their random states are out of reach: others are asked
        assert seen == expected[0][:2]
    assert [values(loader), values(loader), torch.rand(3).tolist(), random.random(), np.random.rand()] == expected


def test_no_more_batches_are_drawn_than_asked_for():
    loader = Epochs()
    lengths = loader.lengths
    assert len(first_batches(loader, 2)) == 2 and len(first_batches(loader, 99)) == 5
    assert loader.epoch == 0 and loader.lengths is lengths and lengths == []


def test_an_iterator_is_not_used_up():
    batches = iter([(torch.ones(2), torch.ones(2))])
    assert first_batches(batches, 1) is None
    assert first_batches(recon.joint_loader({"a": batches}, length="shortest"), 1) is None
    assert len(list(batches)) == 1


def test_a_loader_that_fails_is_put_back_too():
    class Failing(Epochs):
        def __iter__(self):
            yield next(super().__iter__())
            raise OSError("no such image")

    loader, before = Failing(), global_states()
    with pytest.raises(LoaderError, match=r"no such image.*batch 2 of epoch 1"):
        first_batches(loader, 3)
    assert loader.epoch == 0 and torch.equal(before["torch"], global_states()["torch"])
