import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import ProblemError, UsageError
from recon.problems import descriptions, get
from recon.problems.files.surface_normals import normals_from_depth
from recon.problems.problem import Search
from recon_cli.main import main

NAME = "nyuv2"
REAL = Path(__file__).parents[3] / "shared" / "data"
SIZE = (32, 48)
COUNTS = {"train": 5, "val": 3}

needs_the_real_data = pytest.mark.skipif(
    not (REAL / "nyuv2" / "nyuv2_96x128.npz").is_file(), reason="needs NYUv2 in ../shared/data"
)


def frame(seed):
    """A frame as MTAN's folders hold it: float64, channels last."""
    random = np.random.RandomState(seed)
    label = random.randint(-1, 13, SIZE).astype(np.float64)
    depth = random.rand(*SIZE, 1) * 9 + 1
    normal = random.randn(*SIZE, 3)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    unknown = random.rand(*SIZE) < 0.2
    depth[unknown], normal[unknown] = 0, 0
    return {"image": random.rand(*SIZE, 3), "label": label, "depth": depth, "normal": normal}


def write_folders(root):
    for split, count in COUNTS.items():
        for i in range(count):
            for field, array in frame(100 * (split == "val") + i).items():
                (root / split / field).mkdir(parents=True, exist_ok=True)
                np.save(root / split / field / f"{i}.npy", array)
    return root


def packed_arrays(count=8):
    random = np.random.RandomState(0)
    seg13 = random.randint(0, 14, (count, 96, 128)).astype(np.uint8)
    seg13[seg13 == 13] = 255
    return {
        "image": random.randint(256, size=(count, 96, 128, 3)).astype(np.uint8),
        "depth_m": (random.rand(count, 96, 128) * 9 + 1).astype(np.float16),
        "seg13": seg13,
        "train": np.array([6, 1, 3, 4, 0], np.int32),
        "test": np.array([2, 5, 7], np.int32),
    }


def write_packed(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: array for name, array in {**packed_arrays(), **changes}.items() if array is not None}
    np.savez_compressed(folder / "nyuv2_96x128.npz", **arrays)
    return folder


def datasets(root, **options):
    return [loader.dataset for loader in get(NAME, data_root=root, **options).make_loaders(0)]


def everything(dataset):
    return dataset[list(range(len(dataset)))]


def order_of(train, images):
    """Which of the images (M, 3, H, W) each training sample shows."""
    inputs, _ = everything(train)
    distances = (inputs[:, None] - torch.from_numpy(images)[None]).abs().amax((2, 3, 4))
    assert (distances.min(1).values < 1e-3).all()
    return distances.argmin(1).tolist()


# MTAN's folders.


@pytest.mark.parametrize("below", ["nyuv2", "."], ids=["around", "itself"])
def test_the_folders_are_read(below, tmp_path):
    write_folders(tmp_path / below)
    train, test = datasets(tmp_path)
    frames = [frame(100 + i) for i in range(3)]
    inputs, targets = everything(test)
    expected = {key: np.stack([np.moveaxis(f[key], -1, 0) for f in frames]) for key in ("image", "depth", "normal")}
    assert inputs.dtype == torch.float32 and inputs.shape == (3, 3, *SIZE)
    np.testing.assert_allclose(inputs, expected["image"], atol=3e-4)
    np.testing.assert_allclose(targets["depth"], expected["depth"], rtol=5e-4)
    np.testing.assert_allclose(targets["normals"], expected["normal"], atol=3e-4)
    labels = np.stack([f["label"] for f in frames])
    assert targets["segmentation"].dtype == torch.int64
    assert (targets["segmentation"].numpy() == np.where(labels == -1, 255, labels)).all()
    shown = order_of(train, np.stack([np.moveaxis(frame(i)["image"], -1, 0) for i in range(5)]))
    assert sorted(shown) == [0, 1, 2, 3, 4]


def test_a_missing_split_is_named_with_the_official_source(tmp_path):
    (tmp_path / "nyuv2" / "train" / "image").mkdir(parents=True)
    with pytest.raises(ProblemError) as caught:
        get(NAME, data_root=tmp_path)
    message = str(caught.value)
    assert "lacks files of nyuv2: train/label, train/depth, train/normal, val/image, val/label" in message
    assert "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html" in message
    with pytest.raises(ProblemError, match=r"There is no folder .*nowhere.*train and val with image"):
        get(NAME, data_root=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"--data-root DIR.*nyuv2_96x128\.npz"):
        get(NAME)


def truncated():
    file = io.BytesIO()
    np.save(file, frame(0)["image"])
    return file.getvalue()[:-9]


def bytes_of(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("train/image/2.npy", truncated(), r"Cannot read .*train/image/2\.npy"),
        ("train/image/2.npy", b"", r"Cannot read .*train/image/2\.npy"),
        ("train/image/2.npy", b"<html>", r"Cannot read .*train/image/2\.npy"),
        ("train/image/2.npy", bytes_of(np.array([{}])), r"Cannot read .*train/image/2\.npy"),
        ("train/image/2.npy", bytes_of(np.array(["a"])), "does not hold an array of numbers"),
        ("train/image/2.npy", bytes_of(np.zeros((3, *SIZE))), r"image/2\.npy.*shape \(3, 32, 48\).*\(H, W, 3\)"),
        ("train/image/2.npy", bytes_of(np.full((*SIZE, 3), 200.0)), "from 200 to 200, but an image's go from 0 to 1"),
        ("train/image/2.npy", bytes_of(np.full((*SIZE, 3), np.nan)), "not finite"),
        ("train/label/0.npy", bytes_of(np.full(SIZE, 13)), r"label/0\.npy: labels must be whole numbers from 0 to 12"),
        ("train/label/0.npy", bytes_of(np.full(SIZE, 0.5)), "whole numbers"),
        ("train/label/0.npy", bytes_of(np.zeros((*SIZE, 1))), r"must be \(H, W\)"),
        ("val/depth/1.npy", bytes_of(np.full((*SIZE, 1), -1.0)), r"val/depth/1\.npy: it has values below 0"),
        ("val/depth/1.npy", bytes_of(np.zeros((8, 48, 1))), r"val/depth/1\.npy has 8x48 pixels, but other.*32x48"),
        ("val/normal/1.npy", bytes_of(np.full((*SIZE, 3), 2.0)), "values above 1"),
        ("val/normal/1.npy", None, r"val must have .* lacks normal/1\.npy"),
        ("val/normal/7.npy", bytes_of(np.zeros((*SIZE, 3))), r"lacks image/3\.npy, label/3\.npy, depth/3\.npy"),
    ],
)
def test_damaged_files_of_the_folders_are_named(path, content, message, tmp_path):
    file = write_folders(tmp_path) / path
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ProblemError, match=message):
        datasets(tmp_path)


def test_empty_folders(tmp_path):
    for path in write_folders(tmp_path).glob("val/*/*.npy"):
        path.unlink()
    with pytest.raises(ProblemError, match="lacks all"):
        datasets(tmp_path)


# The packed file.


@pytest.mark.parametrize("below", ["nyuv2", "."], ids=["around", "itself"])
def test_the_packed_file_is_read(below, tmp_path):
    write_packed(tmp_path / below)
    train, test = datasets(tmp_path)
    arrays = packed_arrays()
    inputs, targets = everything(test)
    images = np.moveaxis(arrays["image"], -1, 1) / 255
    np.testing.assert_allclose(inputs, images[[2, 5, 7]], atol=1e-6)
    assert (targets["segmentation"].numpy() == arrays["seg13"][[2, 5, 7]]).all()
    assert (targets["depth"][:, 0].numpy() == arrays["depth_m"][[2, 5, 7]]).all()
    assert targets["normals"].shape == (3, 3, 96, 128)
    assert sorted(order_of(train, images.astype(np.float32))) == [0, 1, 3, 4, 6]


def test_normals_of_the_packed_file_are_those_of_its_depth(tmp_path):
    """A floor 1.5 m below a level camera and a wall 8 m ahead: as NYUv2's camera sees them."""
    rows, columns = np.mgrid[:96, :128]
    rays = np.stack([(columns * 5 + 2 - 324.58) / 518.86, (rows * 5 + 2 - 252.74) / 519.47])  # in pixels of 640x480
    to_floor = 1.5 / np.maximum(rays[1], 1e-9)
    depth = np.where(to_floor < 8, to_floor, 8.0)
    depth[10, 20] = np.nan
    arrays = {"depth_m": np.tile(depth.astype(np.float32), (8, 1, 1))}
    _, test = datasets(write_packed(tmp_path, **arrays))
    _, targets = everything(test)
    normals = targets["normals"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(normals[80:, :], np.broadcast_to([0, 1, 0], (16, 128, 3)), atol=5e-3)
    np.testing.assert_allclose(normals[20:40, :], np.broadcast_to([0, 0, 1], (20, 128, 3)), atol=5e-3)
    unknown = {(10, 20), (9, 20), (11, 20), (10, 19), (10, 21)}
    assert {tuple(place) for place in np.argwhere(~normals.any(-1))} == unknown
    assert (targets["depth"][:, 0, 10, 20] == 0).all()


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.3, 0.2, 0.9), (-0.5, 0.6, 0.5), (0.1, -0.7, 0.8)])
def test_normals_of_a_plane(normal):
    normal = np.array(normal) / np.linalg.norm(normal)
    x, y = np.meshgrid((np.arange(40) + 0.5 - 19) / 50, -(np.arange(30) + 0.5 - 16) / 55)
    depth = 3 / (normal[2] - x * normal[0] - y * normal[1])  # where depth * (x, y, -1) meets normal . p = -3
    assert (depth > 0).all()
    found = normals_from_depth(depth[None], (50, 55), (19, 16))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[0], np.broadcast_to(normal[:, None, None], (3, 30, 40)), atol=2e-3)


def test_normals_of_many_images_are_those_of_each():
    depth = np.random.RandomState(0).rand(70, 4, 5) + 1
    together = normals_from_depth(depth, (5, 5), (2, 2))
    alone = np.concatenate([normals_from_depth(d[None], (5, 5), (2, 2)) for d in depth])
    assert (together == alone).all()


SHAPE = (8, 96, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seg13": None}, "seg13"),
        ({"image": np.zeros((*SHAPE, 3))}, "image must be"),
        ({"image": np.zeros((*SHAPE, 4), np.uint8)}, "image must be"),
        ({"depth_m": np.zeros((7, 96, 128), np.float16)}, "depth_m must be"),
        ({"depth_m": np.zeros(SHAPE, np.uint8)}, "depth_m must be"),
        ({"seg13": np.zeros((8, 9), np.uint8)}, "seg13 must be"),
        ({"seg13": np.full(SHAPE, 13, np.uint8)}, "classes below 13"),
        ({"train": np.array([0.5, 1])}, "lists of frames"),
        ({"test": np.array([], int)}, "lists of frames"),
        ({"test": np.array([8])}, "numbers of frames in image"),
        ({"train": np.array([-1, 2])}, "numbers of frames in image"),
        ({"train": np.array([{}, {}])}, "Object arrays"),
    ],
)
def test_a_packed_file_of_something_else(changes, message, tmp_path):
    with pytest.raises(ProblemError, match=rf"nyuv2_96x128\.npz.*{message}"):
        datasets(write_packed(tmp_path, **changes))


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
def test_a_truncated_packed_file(kept, tmp_path):
    path = write_packed(tmp_path) / "nyuv2_96x128.npz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ProblemError, match=r"Cannot read .*nyuv2_96x128\.npz"):
        datasets(tmp_path)


def test_a_packed_file_with_a_flipped_byte(tmp_path):
    path = write_packed(tmp_path) / "nyuv2_96x128.npz"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("image.npy").header_offset + 2000
    content = bytearray(path.read_bytes())
    content[start : start + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"Cannot read .*nyuv2_96x128\.npz"):
        datasets(tmp_path)


# The problem.


@pytest.fixture
def root(tmp_path):
    return write_packed(tmp_path)


def test_some_samples_are_the_same_for_every_seed(root):
    some, more = (list(datasets(root, train_samples=count)[0].inputs) for count in (2, 4))
    assert len(some) == 2 and all(torch.equal(a, b) for a, b in zip(some, more, strict=False))
    with pytest.raises(UsageError, match="batches of 2 samples, so 1 training samples"):
        get(NAME, data_root=root, train_samples=1)
    with pytest.raises(UsageError, match="nyuv2 has 5 training samples, not 6"):
        datasets(root, train_samples=6)


def test_the_paper_s_settings(root):
    problem = get(NAME, data_root=root)
    assert problem.name == NAME and problem.description == descriptions()[NAME]
    assert "derived from depth" in problem.description
    assert problem.task_names == ("segmentation", "depth", "normals")
    assert problem.search == Search(threshold=-0.02, top_k=22, epochs=50) and problem.epochs == 200
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = problem.make_optimizer([parameter])
    scheduler = problem.make_scheduler(optimizer, 5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert isinstance(optimizer, torch.optim.Adam) and rates == [1e-4] * 3 + [5e-5] * 2
    train, test = problem.make_loaders(0)
    assert len(train) == 2 and len(test) == 2 and sum(len(inputs) for inputs, _ in test) == 3


def test_example_inputs_do_not_read_the_data(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "nyuv2_96x128.npz").touch()
    assert get(NAME, data_root=tmp_path / "packed").example_inputs().shape == (2, 3, 96, 128)
    write_folders(tmp_path / "folders")
    assert get(NAME, data_root=tmp_path / "folders").example_inputs().shape == (2, 3, 288, 384)


def test_a_step_on_the_problem_s_own_network(tmp_path):
    problem = get(NAME, data_root=write_folders(tmp_path), train_samples=2)
    inputs, targets = next(iter(problem.make_loaders(0)[0]))
    outputs = problem.make_model()(inputs)
    for task in problem.tasks:
        assert 0 < task.loss(outputs[task.name], targets[task.name]).item() < 100
        for metric in task.metrics:
            state = metric.make()
            state.update(outputs[task.name].detach(), targets[task.name])
            assert 0 <= state.compute().item() < 180


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "."], "lacks files of nyuv2: train/image"),
        (["--data-root", "data", "--train-samples", "1"], "1 training samples are too few"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    write_packed(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["profile", NAME, *options, "--device", "cpu", "--out", "map.json"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "map.json").exists()


# The real data.


@needs_the_real_data
def test_the_real_frames():
    train, test = datasets(REAL)
    assert len(train) == 795 and len(test) == 654
    assert train.inputs.dtype == torch.uint8 and train.inputs.shape[1:] == (3, 96, 128)
    assert set(train.targets["segmentation"].unique().tolist()) == {*range(13), 255}
    depth, normals = test.targets["depth"].float(), test.targets["normals"].float()
    assert depth.min() > 0.5 and depth.max() < 10
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(654, 96, 128), rtol=0, atol=2e-3)
    floor = test.targets["segmentation"] == 4
    up = normals[:, 1][floor]
    assert up.median() > 0.9  # cameras are held about level
