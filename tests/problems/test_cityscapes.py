from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recon.errors import ProblemError, UsageError
from recon.problems import descriptions, get
from recon.problems.problem import Search
from recon_cli.main import main

NAME = "cityscapes"
FULL = (256, 512)  # of the pictures that these tests write; 128x256 is a half of it
COUNTS = {"train": 9, "val": 2}
KINDS = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds", "disparity": "disparity"}

# As the data set's own scripts have them: the labels of each category, void first.
CATEGORIES = [range(7), range(7, 11), range(11, 17), range(17, 21), range(21, 23), [23], [24, 25], range(26, 34)]


def datasets(root, **options):
    return [loader.dataset for loader in get(NAME, data_root=root, **options).make_loaders(0)]


def everything(dataset):
    return dataset[list(range(len(dataset)))]


# MTAN's folders.


def frame(seed):
    random = np.random.RandomState(seed)
    depth = random.rand(16, 32, 1).astype(np.float32) * 0.4
    depth[random.rand(16, 32) < 0.2] = 0
    image = random.rand(16, 32, 3).astype(np.float32)
    return {"image": image, "label_7": random.randint(-1, 7, (16, 32)).astype(np.int64), "depth": depth}


def write_folders(root):
    for split, count in COUNTS.items():
        for i in range(count):
            for field, array in frame(100 * (split == "val") + i).items():
                (root / split / field).mkdir(parents=True, exist_ok=True)
                np.save(root / split / field / f"{i}.npy", array)
    return root


@pytest.mark.parametrize("below", ["cityscapes", "."], ids=["around", "itself"])
def test_the_folders_are_read(below, tmp_path):
    write_folders(tmp_path / below)
    train, test = datasets(tmp_path)
    inputs, targets = everything(test)
    frames = [frame(100), frame(101)]
    np.testing.assert_allclose(inputs, np.stack([np.moveaxis(f["image"], -1, 0) for f in frames]), atol=3e-4)
    np.testing.assert_allclose(targets["inverse_depth"][:, 0], [f["depth"][..., 0] for f in frames], rtol=5e-4)
    labels = np.stack([f["label_7"] for f in frames])
    assert (targets["segmentation"].numpy() == np.where(labels == -1, 255, labels)).all()
    assert targets["segmentation"].dtype == torch.int64 and targets["inverse_depth"].dtype == torch.float32
    assert len(train) == 9


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("label_7", np.full((16, 32), 7), "from 0 to 6"),
        ("depth", np.full((16, 32, 1), np.inf), "not finite"),
        ("image", np.zeros((16, 32)), r"shape \(16, 32\)"),
    ],
)
def test_damaged_files_of_the_folders_are_named(field, content, message, tmp_path):
    write_folders(tmp_path)
    np.save(tmp_path / "val" / field / "1.npy", content)
    with pytest.raises(ProblemError, match=rf"Cannot read .*val/{field}/1\.npy: .*{message}"):
        datasets(tmp_path)


# The official archives.


def pictures(seed):
    random = np.random.RandomState(seed)
    photo = np.repeat(np.repeat(random.randint(256, size=(32, 64, 3)), 8, 0), 8, 1).astype(np.uint8)
    labels = random.randint(0, 34, size=FULL).astype(np.uint8)
    disparity = random.randint(0, 32258, size=FULL).astype(np.uint16)
    disparity[random.rand(*FULL) < 0.2] = 0
    return photo, labels, disparity


def path_of(root, kind, split, i):
    return root / kind / split / f"city{i % 2}" / f"city{i % 2}_00000{i}_000019_{KINDS[kind]}.png"


def write_pictures(root):
    for split, count in COUNTS.items():
        for i in range(count):
            for kind, array in zip(KINDS, pictures(100 * (split == "val") + i), strict=True):
                path = path_of(root, kind, split, i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, compress_level=1)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("cityscapes"))


@pytest.fixture
def root(written, tmp_path):
    """The pictures, of which a test may replace some."""
    for path in written.rglob("*.png"):
        link = tmp_path / path.relative_to(written)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return tmp_path


def test_the_pictures_are_read_at_128x256(written):
    train, test = datasets(written)
    inputs, targets = everything(test)
    assert inputs.shape == (2, 3, 128, 256) and len(train) == 9
    for i in range(2):
        photo, labels, disparity = pictures(100 + i)
        # Squares of 8x8 pixels of one colour become such of 4x4, their edges a mixture.
        np.testing.assert_allclose(inputs[i][:, 2::4, 2::4], np.moveaxis(photo[4::8, 4::8], -1, 0) / 255, atol=0.004)
        labels, disparity = labels[1::2, 1::2], disparity[1::2, 1::2].astype(float)
        category = np.array([next(c for c, ids in enumerate(CATEGORIES) if label in ids) for label in range(34)])
        expected = np.where(category[labels] == 0, 255, category[labels] - 1)
        assert (targets["segmentation"][i].numpy() == expected).all()
        pixels = (disparity - 1) / 256  # Cityscapes' README
        inverse_depth = np.where(disparity > 0, pixels / 256, 0)
        np.testing.assert_allclose(targets["inverse_depth"][i, 0], inverse_depth, rtol=5e-4, atol=1e-7)
        # The data preprocessed for MTAN are 16-bit disparities from 0 to 1.
        np.testing.assert_allclose(targets["inverse_depth"][i, 0], disparity / 65535, rtol=1e-3, atol=2e-5)


def test_labels_and_disparity_stay_with_their_image(written):
    train, _ = datasets(written, train_samples=8)
    inputs, targets = everything(train)
    photos, labels, _ = zip(*map(pictures, range(9)), strict=True)
    for picture, target in zip(inputs, targets["segmentation"], strict=True):
        colours = picture[:, 2::4, 2::4].permute(1, 2, 0).numpy() * 255
        (i,) = [i for i in range(9) if np.abs(photos[i][4::8, 4::8] - colours).max() < 1.5]
        flat = np.isin(labels[i][1::2, 1::2], list(CATEGORIES[1]))
        assert ((target.numpy() == 0) == flat).all()


def test_photographs_are_averaged_when_they_shrink(root):
    path = path_of(root, "leftImg8bit", "val", 0)
    path.unlink()
    stripes = np.zeros((*FULL, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(path)
    _, test = datasets(root)
    shown = test.inputs[0, :, :, 2:-2].float()
    assert shown.min() > 90 and shown.max() < 110


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("leftImg8bit", b"", r"Cannot read .*leftImg8bit\.png"),
        ("gtFine", b"<html>", r"Cannot read .*gtFine_labelIds\.png"),
        ("disparity", -500, r"Cannot read .*disparity\.png"),
        ("gtFine", np.zeros((2, 4), np.uint8), r"gtFine_labelIds\.png must be a grey image of 8 bits and 512x256"),
        ("gtFine", np.zeros((*FULL, 3), np.uint8), r"gtFine_labelIds\.png must be a grey image of 8 bits and 512x256"),
        ("disparity", np.zeros(FULL, np.uint8), r"disparity\.png must be a grey image of 16 bits and 512x256"),
        ("disparity", None, r"lacks disparity/val/city1/city1_000001_000019_disparity\.png.*cityscapes-dataset\.com"),
    ],
)
def test_damaged_pictures_are_named(kind, content, message, root):
    path = path_of(root, kind, "val", 1)
    good = path.read_bytes()
    path.unlink()
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif content is not None:
        path.write_bytes(good[:content] if isinstance(content, int) else content)
    with pytest.raises(ProblemError, match=message):
        datasets(root)


def test_folders_without_pictures(root):
    for path in root.glob("leftImg8bit/val/*/*.png"):
        path.unlink()
    with pytest.raises(ProblemError, match=r"lacks all images of leftImg8bit/val/CITY/\*_leftImg8bit\.png"):
        datasets(root)


# The problem.


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        (["leftImg8bit/train", "gtFine/train"], "leftImg8bit/val, gtFine/val, disparity/train, disparity/val"),
        (["train/image"], "train/label_7, train/depth, val/image, val/label_7, val/depth"),
        ([], "train/image, train/label_7"),
    ],
)
def test_missing_folders_are_named_with_the_official_source(made, missing, tmp_path):
    for folder in made:
        (tmp_path / "cityscapes" / folder).mkdir(parents=True)
    with pytest.raises(ProblemError) as caught:
        get(NAME, data_root=tmp_path)
    message = str(caught.value)
    assert f"lacks files of cityscapes: {missing}" in message and "https://www.cityscapes-dataset.com" in message


def test_without_a_data_root_it_says_what_it_needs():
    with pytest.raises(UsageError, match=r"--data-root DIR .*label_7.*leftImg8bit_trainvaltest\.zip"):
        get(NAME)


def test_too_few_or_too_many_samples(tmp_path):
    write_folders(tmp_path)
    with pytest.raises(UsageError, match="batches of 8 samples, so 7 training samples"):
        get(NAME, data_root=tmp_path, train_samples=7)
    with pytest.raises(UsageError, match="cityscapes has 9 training samples, not 10"):
        datasets(tmp_path, train_samples=10)


def test_the_paper_s_settings(tmp_path):
    for kind in KINDS:
        for split in COUNTS:
            (tmp_path / kind / split).mkdir(parents=True)
    problem = get(NAME, data_root=tmp_path)  # there is no data, which so far nobody has read
    assert problem.name == NAME and problem.description == descriptions()[NAME]
    assert problem.example_inputs().shape == (8, 3, 128, 256)
    assert problem.search == Search(threshold=0.0, top_k=39, epochs=40) and problem.epochs == 200
    optimizer = problem.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler = problem.make_scheduler(optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert isinstance(optimizer, torch.optim.Adam) and rates == [5e-5] * 2 + [2.5e-5] * 2


def test_the_problem_s_own_network_fits_its_tasks(tmp_path):
    problem = get(NAME, data_root=write_folders(tmp_path))
    (inputs, targets), *_ = problem.make_loaders(0)[0]
    # SegNet's smallest image is 32x32.
    inputs, targets = (
        inputs[:2].tile(1, 1, 2, 1),
        {task: target[:2].repeat_interleave(2, dim=-2) for task, target in targets.items()},
    )
    outputs = problem.make_model()(inputs)
    for task in problem.tasks:
        assert 0 < task.loss(outputs[task.name], targets[task.name]).item() < 100
        for metric in task.metrics:
            state = metric.make()
            state.update(outputs[task.name].detach(), targets[task.name])
            assert state.compute() >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "."], "lacks files of cityscapes: train/image"),
        (["--data-root", "data", "--train-samples", "1"], "1 training samples are too few"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    write_folders(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["profile", NAME, *options, "--device", "cpu", "--out", "map.json"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("map.json").exists()
