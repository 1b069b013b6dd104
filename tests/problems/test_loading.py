"""Batches from tensors in memory, and where those tensors are."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from recon.experiments.inputs import make_loaders
from recon.problems import get, loading
from recon.problems.loading import TensorBatches, in_order, prepare, shuffled
from recon.support.network.forward import to_device
from recon.training.batches.batch_stream import BatchStream

META = torch.device("meta")  # stands for a GPU: tensors there have a device, but need no hardware


def dataset():
    inputs = torch.arange(60).reshape(20, 3).to(torch.uint8)
    return TensorBatches(inputs, {"a": torch.arange(20), "b": torch.arange(20.0)}, transform=lambda x: x.float() / 2)


@pytest.fixture
def gpu(monkeypatch):
    """A device with so many free bytes."""

    def free(count):
        monkeypatch.setattr(loading, "free_memory", lambda device: None if device.type == "cpu" else count)

    free(10**9)
    return free


def test_a_batch_holds_the_samples_that_were_asked_for():
    inputs, targets = dataset()[[7, 0, 7]]
    assert inputs.tolist() == [[10.5, 11, 11.5], [0, 0.5, 1], [10.5, 11, 11.5]]
    assert targets["a"].tolist() == targets["b"].tolist() == [7, 0, 7]


def test_moved_data_give_their_batches_there():
    data = dataset()
    assert data.nbytes == 60 + 20 * 8 + 20 * 4
    assert data.to(META) is data
    inputs, targets = data[[3, 1]]
    assert inputs.device == targets["a"].device == targets["b"].device == META
    assert inputs.shape == (2, 3) and inputs.dtype == torch.float32
    there = data.inputs
    assert data.to(META).inputs is there  # moved once


def test_data_that_fit_are_moved_once_and_others_are_pinned(gpu):
    fits, large = shuffled(dataset(), 4, seed=0), shuffled(dataset(), 4, seed=0)
    size = fits.dataset.nbytes
    gpu(4 * size)
    prepare(fits, META)
    gpu(4 * size - 1)
    prepare(large, META)
    assert fits.dataset.inputs.device == META and not fits.pin_memory
    assert large.dataset.inputs.device.type == "cpu" and large.pin_memory
    gpu(0)
    prepare(fits, META)  # it is there already, however much it takes
    assert fits.dataset.inputs.device == META and not fits.pin_memory


def test_what_workers_load_is_pinned(gpu):
    there = DataLoader(TensorDataset(torch.zeros(4)), num_workers=1)
    in_memory = DataLoader(dataset(), num_workers=1)
    prepare(there, META)
    prepare(in_memory, META)
    assert there.pin_memory and in_memory.pin_memory and in_memory.dataset.inputs.device.type == "cpu"


def test_other_loaders_are_left_alone(gpu):
    own = DataLoader(TensorDataset(torch.zeros(4)))
    prepare(own, META)
    prepare([1, 2], META)
    assert not own.pin_memory


def test_so_is_everything_without_a_gpu(gpu):
    for loader in (shuffled(dataset(), 4, seed=0), DataLoader(dataset(), num_workers=1)):
        prepare(loader, torch.device("cpu"))
        assert not loader.pin_memory and loader.dataset.inputs.device.type == "cpu"


def test_a_device_without_memory_of_its_own():
    assert loading.free_memory(torch.device("cpu")) is None


def test_the_order_of_the_batches_stays(gpu):
    here, there = shuffled(dataset(), 4, seed=3), shuffled(dataset(), 4, seed=3)
    prepare(there, META)
    for _ in range(2):  # epochs
        asked = [list(there.sampler)]
        assert asked == [list(here.sampler)]
        assert torch.equal(here.generator.get_state(), there.generator.get_state())


def test_the_loaders_of_a_problem_are_made_ready_for_the_device(gpu):
    digits = get("digits", train_samples=256)
    for loader in make_loaders(digits, 0, META):
        assert next(iter(loader))[0].device == META
    for loader in make_loaders(digits, 0):
        assert next(iter(loader))[0].device.type == "cpu"


def test_a_loader_of_one_s_own_needs_no_dataset(gpu):
    own = [(torch.zeros(1), {})]
    digits = replace(get("digits"), make_loaders=lambda seed: (own, own))
    assert make_loaders(digits, 0, META) == (own, own)


# Moving batches.


class Spy(torch.Tensor):
    """Remembers how it was moved."""

    def to(self, *args, **kwargs):
        self.moved = args, kwargs
        return self


def test_what_is_there_already_is_not_copied():
    batch = torch.zeros(2), {"a": torch.zeros(2)}
    moved = to_device(batch, "cpu")
    assert moved[0] is batch[0] and moved[1]["a"] is batch[1]["a"]


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_only_copies_to_the_cpu_are_waited_for(device, waits):
    tensor = torch.zeros(2).as_subclass(Spy)
    to_device([tensor], device)
    assert tensor.moved == ((device,), {"non_blocking": not waits})


def test_a_resumed_training_does_not_wonder_at_data_that_moved(caplog):
    def stream(loader):
        return BatchStream(loader, remembers=True)

    first = stream(in_order(dataset(), 4))
    next(first.rest(1))
    first.end_step()
    state = first.state_dict()
    for data, wonders in ((dataset().to(META), False), (TensorBatches(torch.ones(20), {}), True)):
        caplog.clear()
        second = stream(in_order(data, 4))
        second.load_state_dict(state)
        with caplog.at_level(logging.WARNING):
            next(second.rest(1))
        assert ("does not repeat its batches" in caplog.text) == wonders
