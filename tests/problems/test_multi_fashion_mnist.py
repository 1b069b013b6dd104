import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import ProblemError, UsageError
from recon.problems import descriptions, get
from recon_cli.main import main

NAME = "multi-fashion-mnist"
REAL = Path(__file__).parents[3] / "shared" / "data"
SPLITS = ("train", "t10k")
COUNT = {"train": 150, "t10k": 20}  # as few as make a batch of 256

needs_the_real_data = pytest.mark.skipif(
    not (REAL / "MNIST" / "raw").is_dir(), reason="needs MNIST and Fashion-MNIST in ../shared/data"
)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def sources(brightest):
    """Images without a dark pixel, so that a canvas shows where their edges are."""
    random = np.random.RandomState(0)
    return {
        (source, split): (
            random.randint(1, brightest + 1, size=(COUNT[split], 28, 28)).astype(np.uint8),
            random.randint(10, size=COUNT[split]).astype(np.uint8),
        )
        for source in ("MNIST", "FashionMNIST")
        for split in SPLITS
    }


def write(root, data, packed=True):
    for (source, split), (images, labels) in data.items():
        folder = root / source / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(idx(array), 1) if packed else idx(array))
    return root


@pytest.fixture(scope="module", params=[120, 255], ids=["no overlap saturates", "overlaps saturate"])
def data(request):
    return sources(request.param)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path, sources(120))


def datasets(root, **options):
    return [loader.dataset for loader in get(NAME, data_root=root, **options).make_loaders(0)]


def find(canvas, digits, items):
    """The digit and the item that this canvas shows, as `(index, row, column)`."""
    rows, columns = canvas.any(axis=1).nonzero()[0], canvas.any(axis=0).nonzero()[0]
    place, other = (rows[0], columns[0]), (rows[-1] - 27, columns[-1] - 27)
    for i, digit in enumerate(digits):
        if place != (4, 4) and canvas[place] != digit[0, 0]:  # where no item reaches: only a quick look
            continue
        for j, item in enumerate(items):
            if other != (4, 4) and canvas[rows[-1], columns[-1]] != item[-1, -1]:
                continue
            expected = np.zeros((36, 36), int)
            expected[place[0] : place[0] + 28, place[1] : place[1] + 28] += digit
            expected[other[0] : other[0] + 28, other[1] : other[1] + 28] += item
            if (np.minimum(expected, 255) == canvas).all():
                return (i, *place), (j, *other)
    raise AssertionError("this canvas shows no digit and item of the sources")


def transposed(rows):
    return list(zip(*rows, strict=True))


# The canvases.


@pytest.mark.parametrize("packed", [True, False], ids=["gzipped", "plain"])
def test_canvases_show_every_source_image_twice_in_its_corner_with_its_label(data, packed, tmp_path):
    for dataset, split in zip(datasets(write(tmp_path, data, packed)), SPLITS, strict=True):
        (digits, digit_labels), (items, item_labels) = (data[source, split] for source in ("MNIST", "FashionMNIST"))
        assert dataset.inputs.shape == (2 * COUNT[split], 1, 36, 36) and dataset.inputs.dtype == torch.uint8
        seen = [find(canvas, digits, items) for canvas in dataset.inputs[:, 0].numpy()]
        for task, labels, shown in zip(
            ("digit", "fashion"), (digit_labels, item_labels), transposed(seen), strict=True
        ):
            assert sorted(index for index, _, _ in shown) == sorted([*range(COUNT[split])] * 2)
            assert dataset.targets[task].tolist() == [labels[index] for index, _, _ in shown]
            assert dataset.targets[task].dtype == torch.int64
            places = range(5) if task == "digit" else range(4, 9)
            assert {row for _, row, _ in shown} == {column for _, _, column in shown} == set(places)


def test_batches_are_floats_from_0_to_1(tmp_path):
    train, test = get(NAME, data_root=write(tmp_path, sources(255))).make_loaders(0)
    (inputs, targets), *others = train
    assert not others and len(train) == 1
    assert inputs.shape == (256, 1, 36, 36) and inputs.dtype == torch.float32
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert {task: (len(target), target.dtype) for task, target in targets.items()} == dict.fromkeys(
        ("digit", "fashion"), (256, torch.int64)
    )
    shown = torch.cat([inputs for inputs, _ in test])
    torch.testing.assert_close(shown * 255, test.dataset.inputs.float())


def test_a_seed_shuffles_the_batches_and_nothing_else(root):
    (train, test), (other, other_test) = (get(NAME, data_root=root).make_loaders(seed) for seed in (0, 1))
    assert torch.equal(train.dataset.inputs, other.dataset.inputs)
    assert torch.equal(test.dataset.inputs, other_test.dataset.inputs)
    (inputs, _), (other_inputs, _) = next(iter(train)), next(iter(other))
    assert not torch.equal(inputs, other_inputs)


def test_its_name_and_description_are_as_listed(root):
    problem = get(NAME, data_root=str(root))
    assert problem.name == NAME and problem.description == descriptions()[NAME]
    assert set(problem.make_model()(torch.rand(2, 1, 36, 36))) == set(problem.task_names)


def test_the_first_samples_only(root):
    (all_of_them, test), (some, same_test) = datasets(root), datasets(root, train_samples=260)
    assert torch.equal(some.inputs, all_of_them.inputs[:260]) and torch.equal(test.inputs, same_test.inputs)
    assert torch.equal(some.targets["digit"], all_of_them.targets["digit"][:260])
    assert some.inputs.untyped_storage().nbytes() == 260 * 36 * 36


def test_the_first_half_of_the_samples_has_every_source_image_once(tmp_path):
    data = sources(120)
    half = datasets(write(tmp_path, data))[0].inputs[: COUNT["train"], 0].numpy()
    seen = [find(canvas, data["MNIST", "train"][0], data["FashionMNIST", "train"][0]) for canvas in half]
    assert all(sorted(index for index, _, _ in shown) == list(range(COUNT["train"])) for shown in transposed(seen))


@pytest.mark.parametrize(("steps", "halves"), [(100, (50, 75)), (7, (4, 6)), (1, (1, 1))])
def test_the_learning_rate_falls_after_a_half_and_after_three_quarters(steps, halves, root):
    problem = get(NAME, data_root=root)
    optimizer = problem.make_optimizer(problem.make_model().parameters())
    scheduler = problem.make_scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    first, second = halves
    assert rates == pytest.approx([0.1] * first + [0.01] * (second - first) + [0.001] * (steps - second))


# Wrong input.


def test_without_a_data_root_it_says_what_it_needs():
    with pytest.raises(UsageError, match=r"--data-root DIR .* MNIST/raw and FashionMNIST/raw"):
        get(NAME)


@pytest.mark.parametrize("samples", [1, 255, 301])
def test_too_few_or_too_many_samples(samples, root):
    with pytest.raises(UsageError, match=rf"{samples} training samples|300 training samples, not {samples}"):
        get(NAME, data_root=root, train_samples=samples).make_loaders(0)


def test_missing_files_are_named_at_once_with_the_official_sources(root, tmp_path):
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ProblemError) as caught:
        get(NAME, data_root=root)
    message = str(caught.value)
    assert message.startswith(f"{root} lacks files of {NAME}: MNIST/raw/t10k-labels-idx1-ubyte. Expected are")
    assert "http://yann.lecun.com/exdb/mnist" in message and "github.com/zalandoresearch/fashion-mnist" in message
    with pytest.raises(ProblemError, match=r"There is no folder .*nowhere"):
        get(NAME, data_root=tmp_path / "nowhere")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (f"{IMAGES}.gz", gzip.compress(bytes(9999), mtime=0)[:-9], f"Cannot read .*{IMAGES}.gz"),
        (f"{IMAGES}.gz", b"not gzipped", f"Cannot read .*{IMAGES}.gz"),
        (IMAGES, b"", f"{IMAGES} is not an idx file of bytes in 3"),
        (IMAGES, b"<html>not found</html>", f"{IMAGES} is not an idx file of bytes in 3"),
        (LABELS, idx(np.zeros((4, 28, 28), np.uint8)), f"{LABELS} is not an idx file of bytes in 1"),
        (IMAGES, idx(np.zeros((4, 28, 28), np.uint8))[:-1], "3136 bytes of data, 4 x 28 x 28, but has 3135"),
        (IMAGES, idx(np.zeros((4, 28, 28), np.uint8)) + b"?", "but has 3137"),
        (IMAGES, idx(np.zeros((4, 28, 28), np.uint8)), "holds 4 train images, but 150 labels"),
        (IMAGES, idx(np.zeros((150, 32, 32), np.uint8)), r"28x28 pixels, but has \(32, 32\)"),
        (LABELS, idx(np.full(150, 10, np.uint8)), r"labels from 0 to 9, but has \[10\]"),
    ],
)
def test_damaged_files_are_named(name, content, message, root):
    (root / "MNIST" / "raw" / name).write_bytes(content)  # a plain file is taken before a gzipped one
    with pytest.raises(ProblemError, match=message):
        datasets(root)


def test_a_file_that_is_gone_when_it_is_read(root):
    problem = get(NAME, data_root=root)
    (root / "MNIST" / "raw" / f"{LABELS}.gz").unlink()
    with pytest.raises(ProblemError, match=rf"neither .*{LABELS} nor {LABELS}\.gz"):
        problem.make_loaders(0)


def test_both_sources_have_as_many_images(tmp_path):
    data = sources(120)
    data["MNIST", "train"] = tuple(array[:-1] for array in data["MNIST", "train"])
    with pytest.raises(ProblemError, match=r"equally many images, but have \[149, 150\]"):
        datasets(write(tmp_path, data))


# Pareto MTL's file.


def pickled(folder, content, protocol=pickle.DEFAULT_PROTOCOL):
    (folder / "multi_fashion_and_mnist.pickle").write_bytes(pickle.dumps(content, protocol))
    return folder


def canvases(train=300, test=20):
    random = np.random.RandomState(0)
    images = [random.randint(256, size=(count, 36, 36)).astype(np.uint8) for count in (train, test)]
    labels = [random.randint(10, size=(count, 2)) for count in (train, test)]
    return images[0], labels[0], images[1], labels[1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "stored",
    [
        lambda images: images,
        lambda images: images.reshape(-1, 1, 36, 36).astype(np.float32),
        lambda images: images.reshape(-1, 1296) / 255,
        lambda images: images.astype(np.int64),
    ],
    ids=["bytes", "floats to 255", "floats to 1", "integers"],
)
def test_the_pickle_is_read(stored, protocol, tmp_path):
    train_x, train_y, test_x, test_y = canvases()
    train, test = datasets(pickled(tmp_path, (stored(train_x), train_y, stored(test_x), test_y), protocol))
    for dataset, images, labels in ((train, train_x, train_y), (test, test_x, test_y)):
        assert dataset.inputs.dtype == torch.uint8 and (dataset.inputs[:, 0].numpy() == images).all()
        assert [dataset.targets[task].tolist() for task in ("digit", "fashion")] == labels.T.tolist()


def test_the_pickle_of_an_older_numpy_is_read(tmp_path):
    content = pickle.dumps(canvases(), 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "multi_fashion_and_mnist.pickle").write_bytes(content)
    assert (datasets(tmp_path)[0].inputs[:, 0].numpy() == canvases()[0]).all()


def test_the_pickle_is_taken_before_the_sources(root):
    pickled(root, canvases())
    assert (datasets(root)[0].inputs[:, 0].numpy() == canvases()[0]).all()
    train, _ = datasets(root, train_samples=256)
    assert (train.inputs[:, 0].numpy() == canvases()[0][:256]).all()
    assert train.targets["fashion"].tolist() == canvases()[1][:256, 1].tolist()


class Malicious:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_the_pickle_does_not_run(protocol, tmp_path):
    trace = tmp_path / "trace"
    code = Malicious(f"open({str(trace)!r}, 'w')")
    for content in (code, (*canvases()[:3], code), (*canvases()[:3], np.array([code], dtype=object))):
        with pytest.raises(ProblemError, match=r"Refused to unpickle \w+\.eval"):
            datasets(pickled(tmp_path, content, protocol))
    assert not trace.exists()
    pickle.loads((tmp_path / "multi_fashion_and_mnist.pickle").read_bytes())
    assert trace.exists()  # so it would have


def changed(**changes):
    names = ("train_x", "train_y", "test_x", "test_y")
    return tuple(changes.get(name, array) for name, array in zip(names, canvases(), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (canvases()[:3], "must hold four numpy arrays"),
        ([*canvases()[:3], [0, 1]], "must hold four numpy arrays"),
        (changed(train_y=np.zeros((300, 3), int)), r"shapes \(300, 36, 36\) and \(300, 3\)"),
        (changed(test_x=np.zeros((20, 28, 28))), r"shapes \(20, 28, 28\) and \(20, 2\)"),
        (changed(test_x=np.zeros((0, 36, 36)), test_y=np.zeros((0, 2))), r"shapes \(0, 36, 36\)"),
        (changed(train_y=np.full((300, 2), 10)), "whole numbers from 0 to 9"),
        (changed(train_y=np.full((300, 2), 0.5)), "whole numbers from 0 to 9"),
        (changed(test_x=np.full((20, 36, 36), 256)), "grey values"),
        (changed(test_x=np.full((20, 36, 36), -1.0)), "grey values"),
        (changed(test_x=np.full((20, 36, 36), np.nan)), "grey values"),
        (changed(test_x=np.full((20, 36, 36), "a")), "grey values"),
    ],
)
def test_a_pickle_of_another_layout(content, message, tmp_path):
    with pytest.raises(ProblemError, match=message):
        datasets(pickled(tmp_path, content))


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_truncated_pickle(kept, tmp_path):
    path = pickled(tmp_path, canvases()) / "multi_fashion_and_mnist.pickle"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ProblemError, match=r"Cannot read .*multi_fashion_and_mnist\.pickle"):
        datasets(tmp_path)


# The command line.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "nowhere"], "There is no folder nowhere"),
        (["--data-root", "."], "MNIST/raw/train-images-idx3-ubyte"),
        (["--data-root", "data", "--train-samples", "100"], "100 training samples are too few"),
        (["--data-root", "data", "--train-samples", "1000"], "has 300 training samples"),
        (["--data-root", "data", "--train-samples", "none"], "argument --train-samples: 'none' is not a whole number"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", sources(120))
    monkeypatch.chdir(tmp_path)
    assert main(["profile", NAME, *options, "--device", "cpu", "--out", "map.json"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "map.json").exists()


def test_listed_without_reading_anything(capsys):
    assert main(["problems"]) == 0
    assert any(NAME in line and "--data-root" in line for line in capsys.readouterr().out.splitlines())


# The real data.


@needs_the_real_data
def test_the_real_data_make_the_published_number_of_canvases():
    for dataset, split, count in zip(datasets(REAL), SPLITS, (120_000, 20_000), strict=True):
        assert dataset.inputs.shape == (count, 1, 36, 36)
        for task, source in (("digit", "MNIST"), ("fashion", "FashionMNIST")):
            packed = (REAL / source / "raw" / f"{split}-labels-idx1-ubyte.gz").read_bytes()
            labels = torch.frombuffer(bytearray(gzip.decompress(packed)), dtype=torch.uint8, offset=8)
            assert dataset.targets[task].bincount().tolist() == (2 * labels.bincount()).tolist()
