"""joint_loader: which batches meet, in which order, how many; and what it refuses."""

from itertools import islice

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import recon
from recon.errors import LoaderError, ProblemError, UsageError
from recon.problems.loading import prepare
from recon.support.loaders import all_inner_loaders
from recon.training.batches.batch_stream import RankBatches, batch_count
from recon.training.batches.first_look import first_batches


def numbers(count, size, first=0, **options):
    """Batches of `size` of the numbers from `first` on, which are their own targets."""
    x = torch.arange(first, first + count)
    return DataLoader(TensorDataset(x, x), size, **options)


def seen(batches):
    return [{task: x.tolist() for task, (x, _) in batch.items()} for batch in batches]


class Lengthless(IterableDataset):
    def __iter__(self):
        return ((torch.tensor(n), torch.tensor(n)) for n in range(4))


def test_the_longest_loader_says_how_many_steps_and_shorter_ones_begin_again():
    loader = recon.joint_loader({"a": numbers(5, 2), "b": numbers(2, 1, 10), "c": numbers(3, 3, 20)})
    assert len(loader) == 3
    for _ in range(2):  # two epochs
        assert seen(loader) == [
            {"a": [0, 1], "b": [10], "c": [20, 21, 22]},
            {"a": [2, 3], "b": [11], "c": [20, 21, 22]},
            {"a": [4], "b": [10], "c": [20, 21, 22]},
        ]


def test_the_shortest_ends_it_and_needs_no_length():
    loader = recon.joint_loader({"a": numbers(5, 2), "b": DataLoader(Lengthless(), 2)}, length="shortest")
    assert seen(loader) == [{"a": [0, 1], "b": [0, 1]}, {"a": [2, 3], "b": [2, 3]}] == seen(loader)
    assert batch_count(loader) is None
    assert len(recon.joint_loader({"a": numbers(5, 2), "b": numbers(2, 1)}, length="shortest")) == 2


@pytest.mark.parametrize("steps", [1, 4])
def test_so_many_steps(steps):
    loader = recon.joint_loader({"a": numbers(5, 2), "b": DataLoader(Lengthless(), 2)}, length=steps)
    assert len(loader) == steps == batch_count(loader)
    expected = [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4], [0, 1]), ([0, 1], [2, 3])]
    assert seen(loader) == [{"a": a, "b": b} for a, b in expected[:steps]]


def test_every_pass_of_a_loader_is_shuffled_anew():
    loader = recon.joint_loader({"a": numbers(30, 30, shuffle=True), "b": numbers(3, 1)}, length=3)
    orders = [batch["a"] for _ in range(2) for batch in seen(loader)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_two_loaders_of_the_same_data_have_orders_of_their_own():
    loader = recon.joint_loader({"a": numbers(30, 30, shuffle=True), "b": numbers(30, 30, shuffle=True)})
    (batch,) = seen(loader)
    assert batch["a"] != batch["b"]


def test_the_same_seed_gives_the_same_batches_whatever_is_drawn_between_them():
    loader = recon.joint_loader({"a": numbers(20, 2, shuffle=True), "b": numbers(6, 2, shuffle=True)})
    epochs = []
    for draws in (0, 3):
        torch.manual_seed(4)
        epochs.append([])
        for batch in loader:
            epochs[-1].append(seen([batch]))
            torch.rand(draws)
    assert epochs[0] == epochs[1]


def test_workers():
    loader = recon.joint_loader({"a": numbers(4, 2, num_workers=1), "b": numbers(2, 2, 10, num_workers=1)})
    assert seen(loader) == [{"a": [0, 1], "b": [10, 11]}, {"a": [2, 3], "b": [10, 11]}]


def test_targets_by_name_as_they_are_or_absent():
    x = torch.zeros(2)
    boxes = {"boxes": torch.ones(1)}  # a target that is a dict
    loader = recon.joint_loader(
        {"a": [(x, {"a": 1, "other": 2})], "b": [[x, boxes]], "c": [(x, {"c": None})], "d": [(x, None)]}
    )
    (batch,) = loader
    assert {task: target for task, (_, target) in batch.items()} == {"a": 1, "b": boxes, "c": None, "d": None}


def test_once_gives_every_batch_of_every_loader_once():
    loader = recon.joint_loader({"a": numbers(5, 2), "b": numbers(1, 1, 10)}, length=7)
    assert seen(loader.once()) == [{"a": [0, 1], "b": [10]}, {"a": [2, 3]}, {"a": [4]}]


@pytest.mark.parametrize(
    ("loaders", "length", "message"),
    [
        ({}, "longest", "got none"),
        ([numbers(2, 1)], "longest", "got list"),
        ({1: numbers(2, 1)}, "longest", "a loader has the name 1"),
        ({"a": 3}, "longest", "loader of task 'a' is int"),
        ({"a": {"x": numbers(2, 1)}}, "longest", "loader of task 'a' is dict"),
        ({"a": numbers(2, 1)}, "mean", "length is 'mean'"),
        ({"a": numbers(2, 1)}, 0, "length is 0"),
        ({"a": numbers(2, 1)}, 2.0, r"length is 2\.0"),
        ({"a": numbers(2, 1)}, True, "length is True"),
        ({"a": numbers(2, 1), "b": DataLoader(Lengthless())}, "longest", "'b' does not say how many"),
        ({"a": iter([])}, "longest", "'a' does not say how many"),
    ],
    ids=["none", "list", "number", "int", "dict", "mean", "zero", "float", "bool", "lengthless", "iterator"],
)
def test_what_cannot_be_joined(loaders, length, message):
    with pytest.raises(UsageError, match=message):
        recon.joint_loader(loaders, length)


def test_a_loader_that_is_empty_is_named():
    with pytest.raises(LoaderError, match="loader of task 'b' gave no batch"):
        list(recon.joint_loader({"a": numbers(2, 1), "b": []}))


def test_a_loader_that_ends_and_cannot_begin_again_is_named():
    pair = (torch.zeros(1), torch.zeros(1))
    loader = recon.joint_loader({"a": numbers(4, 1), "b": iter([pair] * 2)}, length=4)
    batches = iter(loader)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(LoaderError, match="task 'b' ended, and gave no batch when it began again"):
        next(batches)
    with pytest.raises(LoaderError, match="loader of task 'b' gave no batch"):  # the next epoch
        next(iter(loader))


class Broken:
    def __len__(self):
        return 3

    def __iter__(self):
        yield torch.zeros(1), torch.zeros(1)
        raise OSError("no such image")


@pytest.mark.parametrize("train", [False, True])
def test_a_loader_that_raises_is_named(train):
    loader = recon.joint_loader({"a": numbers(3, 1), "b": Broken()})
    with pytest.raises(LoaderError, match=r"OSError: no such image.*loader of task 'b' for batch 2 of pass 1"):
        list(recon.training.batches.batch_stream.BatchStream(loader, False).rest(1) if train else loader)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (torch.zeros(2), "gave Tensor"),
        ((torch.zeros(2),), r"gave \(Tensor\)"),
        (recon.inputs(torch.zeros(2)), "gave Inputs"),
        ({"x": torch.zeros(2)}, "gave dict"),
    ],
    ids=["tensor", "single", "inputs", "dict"],
)
def test_a_batch_of_another_form(batch, got):
    with pytest.raises(ProblemError, match=rf"loader of task 'a' must yield \(inputs, target\).* but {got}"):
        list(recon.joint_loader({"a": [batch]}))


@pytest.mark.parametrize("run", ["train", "profile", "evaluate"])
def test_a_dict_of_loaders_is_told_to_be_joined(run):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match=r"loader is a dict, of 'a', 'b'.*recon\.joint_loader"):
        loaders = {"a": numbers(2, 1), "b": numbers(2, 1)}
        if run == "evaluate":
            recon.evaluate(model, loaders, [recon.Task("a", mse_loss)])
        else:
            losses = {"a": mse_loss, "b": mse_loss}
            getattr(recon, run)(model, loaders, losses, optimizer=torch.optim.SGD(model.parameters(), 0.1))


def test_each_rank_gets_its_part_of_every_tasks_batch(monkeypatch):
    monkeypatch.setattr("recon.training.batches.batch_stream.world_size", lambda: 2)
    monkeypatch.setattr("recon.training.batches.batch_stream.rank", lambda: 1)
    loader = RankBatches(recon.joint_loader({"a": numbers(10, 5), "b": numbers(3, 2, 20)}))
    # The last batch of b has one sample, which cannot be shared out.
    assert seen(loader) == [{"a": [2, 3], "b": [21]}, {"a": [7, 8]}]
    assert seen(loader.once()) == seen(loader)
    mixed = RankBatches([(torch.arange(4), {"a": torch.arange(4)}), {"a": None, "b": (torch.arange(2), None)}])
    first, second = mixed
    assert first[0].tolist() == first[1]["a"].tolist() == [2, 3]
    assert second["b"][0].tolist() == [1] and second["b"][1] is None


def test_a_look_at_the_first_batches_changes_nothing():
    loader = recon.joint_loader({"a": numbers(8, 2, shuffle=True), "b": numbers(4, 2, shuffle=True)})
    torch.manual_seed(1)
    expected = seen(loader)
    torch.manual_seed(1)
    assert seen(first_batches(loader, 2)) == expected[:2]
    assert seen(loader) == expected


def test_what_is_inside_is_found():
    inner = {"a": numbers(2, 1), "b": numbers(2, 1, pin_memory=False)}
    joint = recon.joint_loader(inner)
    assert all_inner_loaders(RankBatches(joint)) == {"loader": joint, "loader.a": inner["a"], "loader.b": inner["b"]}
    prepare(joint, torch.device("cpu"))
    assert not inner["b"].pin_memory
