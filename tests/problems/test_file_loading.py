import os

import pytest
import torch
from torch.utils.data import Dataset

from recon.errors import ProblemError
from recon.problems.file_loading import FileLoader
from recon.training.batches.batch_stream import BatchStream


class Counted(Dataset):
    """Sample 3 is the pair (3, whether it is mirrored); sample `damaged` cannot be read."""

    def __init__(self, count, damaged=None):
        self.count, self.damaged = count, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        index, mirrored = key
        if index == self.damaged:
            raise ProblemError(f"Cannot read {index}.jpg: it is damaged.")
        return index, mirrored


def collate(samples):
    return torch.tensor(samples), {}


def drawn(loader):
    return torch.stack([inputs for inputs, _ in loader])


def test_in_training_each_sample_once_a_pass_and_half_of_them_mirrored():
    first, second = (drawn(FileLoader(Counted(401), 4, collate, seed=0)) for _ in range(2))
    assert first.shape == (100, 4, 2) and torch.equal(first, second)
    assert first[..., 0].unique().numel() == 400 and 150 < first[..., 1].sum() < 250
    assert not torch.equal(first, drawn(FileLoader(Counted(401), 4, collate, seed=1)))


def test_every_pass_has_a_new_order_and_mirrors_others():
    loader = FileLoader(Counted(40), 4, collate, seed=0)
    passes = [drawn(loader).flatten(0, 1) for _ in range(2)]
    assert not torch.equal(*passes)
    mirrored = [one[one[:, 0].argsort(), 1] for one in passes]
    assert not torch.equal(*mirrored)


def test_to_test_all_samples_in_order():
    batches = [inputs.tolist() for inputs, _ in FileLoader(Counted(5), 2, collate, seed=None)]
    assert batches == [[[0, 0], [1, 0]], [[2, 0], [3, 0]], [[4, 0]]]


def test_neither_workers_nor_global_random_states_change_the_batches():
    before = torch.get_rng_state()
    alone = drawn(FileLoader(Counted(40), 4, collate, seed=0, workers=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn(FileLoader(Counted(40), 4, collate, seed=0, workers=2)), alone)


def test_workers_where_there_are_batches_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    counts = [FileLoader(Counted(count), 4, collate, seed=0).num_workers for count in (8, 31, 32, 64, 4000)]
    assert counts == [0, 0, 1, 2, 3]


def test_an_interrupted_training_goes_on_with_the_same_batches():
    whole = BatchStream(FileLoader(Counted(20), 4, collate, seed=0), remembers=True)
    expected = [inputs for _ in range(2) for inputs, _ in list(whole.rest(1))]
    stream = BatchStream(FileLoader(Counted(20), 4, collate, seed=0), remembers=True)
    for _ in stream.rest(1):
        stream.end_step()
    stream.begin_epoch()
    batches = stream.rest(2)
    for _ in range(2):
        next(batches)
        stream.end_step()
    resumed = BatchStream(FileLoader(Counted(20), 4, collate, seed=0), remembers=True)
    resumed.load_state_dict(stream.state_dict())
    rest = [inputs for inputs, _ in resumed.rest(2)]
    assert len(rest) == 3 and all(map(torch.equal, rest, expected[-3:]))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_reads_the_same_from_a_worker(workers):
    loader = FileLoader(Counted(8, damaged=5), 4, collate, seed=None, workers=workers)
    with pytest.raises(ProblemError) as caught:
        list(loader)
    assert str(caught.value) == "Cannot read 5.jpg: it is damaged."
