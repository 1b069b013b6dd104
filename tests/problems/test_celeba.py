import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.datasets import CelebA
from torchvision.models import resnet18

from recon.errors import CheckpointError, ProblemError, UsageError
from recon.problems import descriptions, get
from recon.problems.sets import celeba
from recon_cli.main import main

NAME = "celeba"
COUNT = {"train": 11, "valid": 2, "test": 5}
ATTRIBUTES = list(celeba.ATTRIBUTES)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(celeba, "BATCH", 4)


@pytest.fixture(scope="module")
def samples():
    """Smooth images, which JPEG keeps nearly as they are, and their attributes."""
    random = np.random.RandomState(0)
    count = sum(COUNT.values())
    coarse = torch.from_numpy(random.randint(256, size=(count, 3, 3, 3))).float()
    images = F.interpolate(coarse, size=(109, 89), mode="bicubic").clamp(0, 255).byte()
    return images.permute(0, 2, 3, 1).numpy(), random.randint(2, size=(count, 40))


def write(root, samples):
    images, labels = samples
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06}.jpg" for number in range(1, 1 + len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / "img_align_celeba" / name, quality=95)
    rows = [f"{name} {' '.join(f'{2 * one - 1:2}' for one in row)}\n" for name, row in zip(names, labels, strict=True)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\n{' '.join(ATTRIBUTES)} \n{''.join(rows)}")
    numbers = [number for number, split in enumerate(COUNT) for _ in range(COUNT[split])]
    rows = [f"{name} {number}\n" for name, number in zip(names, numbers, strict=True)]
    (folder / "list_eval_partition.txt").write_text("".join(rows))
    return root


@pytest.fixture
def root(samples, tmp_path):
    return write(tmp_path, samples)


def datasets(root, **options):
    return [loader.dataset for loader in get(NAME, data_root=root, **options).make_loaders(0)]


# The data.


def test_the_attributes_are_those_of_torchvisions_reader(root, monkeypatch):
    rows = (root / "celeba" / "list_eval_partition.txt").read_text()  # stand in for lists that are of no use here
    (root / "celeba" / "identity_CelebA.txt").write_text(rows)
    for name in ("list_bbox_celeba", "list_landmarks_align_celeba"):
        (root / "celeba" / f"{name}.txt").write_text(f"18\nx\n{rows}")
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)
    for dataset, split in zip(datasets(root), ("train", "test"), strict=True):
        theirs = CelebA(root, split)
        assert theirs.attr_names[:40] == ATTRIBUTES == list(dataset.targets)
        assert torch.equal(torch.stack(list(dataset.targets.values()), dim=1), theirs.attr)


def test_images_are_resized_and_normalised(root, samples):
    train, test = get(NAME, data_root=root).make_loaders(0)
    shown = torch.cat([inputs for inputs, _ in test])
    assert shown.shape == (5, 3, 64, 64) and shown.dtype == torch.float32
    expected = torch.from_numpy(samples[0][-5:]).permute(0, 3, 1, 2).double() / 255
    expected = F.interpolate(expected, size=(64, 64), mode="bilinear", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    assert (shown * std + mean - expected).abs().mean() < 0.01  # what JPEG loses
    assert len(train) == 2 and next(iter(train))[0].shape == (4, 3, 64, 64)


def test_a_seed_shuffles_the_batches(root):
    def passes(seed):
        train, _ = get(NAME, data_root=root).make_loaders(seed)
        return [targets["Male"] for _ in range(3) for _, targets in train]

    assert all(map(torch.equal, passes(0), passes(0))) and not all(map(torch.equal, passes(0), passes(1)))


# The file of decoded images.


def test_images_are_decoded_once(root):
    first = datasets(root)
    for image in (root / "celeba" / "img_align_celeba").iterdir():
        image.unlink()
    for before, after in zip(first, datasets(root), strict=True):
        assert torch.equal(before.inputs, after.inputs)
    (some, _) = datasets(root, train_samples=6)
    assert torch.equal(some.inputs, first[0].inputs[:6]) and len(some.targets["Young"]) == 6


@pytest.mark.parametrize("spoil", [lambda images: images[:-1], lambda images: images.float(), lambda images: "?"])
def test_a_file_of_other_images_is_made_again(spoil, root):
    before = datasets(root)[0].inputs.clone()
    path = root / "celeba" / "recon-train-64x64.npy"
    np.save(path, spoil(before))
    assert torch.equal(datasets(root)[0].inputs, before) and np.load(path).shape == (11, 3, 64, 64)


def test_a_truncated_file_is_made_again(root):
    before = datasets(root)[0].inputs.clone()
    path = root / "celeba" / "recon-train-64x64.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(datasets(root)[0].inputs, before)


def test_without_a_place_to_write_the_images_stay_in_memory(root, monkeypatch, caplog):
    before, _ = datasets(root)
    (path,) = (root / "celeba").glob("recon-train-*")
    path.unlink()
    (some, _) = datasets(root, train_samples=6)  # a part is not kept
    assert torch.equal(some.inputs, before.inputs[:6]) and not path.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert torch.equal(datasets(root)[0].inputs, before.inputs) and not path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(celeba, "BATCH", 4)
    monkeypatch.setattr(os, "replace", no_space)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(datasets(root)[0].inputs, before.inputs) and not path.exists()
    assert "Cannot write" in caplog.text and "stay in memory" in caplog.text


def no_space(*_):
    raise OSError(28, "No space left on device")


# The problem.


def test_its_network_metric_and_settings(root):
    problem = get(NAME, data_root=root)
    assert problem.name == NAME and problem.description == descriptions()[NAME]
    assert list(problem.task_names) == ATTRIBUTES and len(set(ATTRIBUTES)) == 40
    logits = problem.make_model()(problem.example_inputs())
    assert {task: tuple(out.shape) for task, out in logits.items()} == dict.fromkeys(ATTRIBUTES, (8, 2))
    error = problem.tasks[0].metrics[0].make()
    for chosen in ([0, 1, 1], [0, 0]):  # against ones: three right of five
        error.update(F.one_hot(torch.tensor(chosen), 2).float(), torch.ones(len(chosen), dtype=torch.long))
    assert float(error.compute()) == pytest.approx(3 / 5) and not problem.tasks[0].metrics[0].higher_is_better


def test_the_learning_rate_is_halved_after_three_of_five_epochs(root):
    problem = get(NAME, data_root=root)
    optimizer = problem.make_optimizer(problem.make_model().parameters())
    scheduler = problem.make_scheduler(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([5e-5] * 6 + [2.5e-5] * 4)


def test_the_trunk_starts_from_imagenet_weights(root, tmp_path):
    path = tmp_path / "resnet18.pth"
    given = resnet18().state_dict()
    torch.save(given, path)
    model = get(NAME, data_root=root, pretrained=path).make_model()
    for name, tensor in model.state_dict().items():
        assert name.startswith("heads.") or torch.equal(tensor, given[name])
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="does not hold the weights of a resnet18"):
        get(NAME, data_root=root, pretrained=path).make_model()


# Wrong input.


@pytest.mark.parametrize("name", ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"])
def test_missing_files_are_named_with_the_official_source(name, root):
    (root / "celeba" / name).rename(root / "elsewhere")
    with pytest.raises(ProblemError) as caught:
        get(NAME, data_root=root)
    message = str(caught.value)
    assert f"lacks files of celeba: celeba/{name}. Expected are" in message
    assert "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html" in message


def changed(path, old, new, count=1):
    path.write_text(path.read_text().replace(old, new, count))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("list_attr_celeba.txt", "18\n", "", r"Cannot read .*list_attr_celeba\.txt"),
        ("list_attr_celeba.txt", "18\n", "19\n", "must hold 19 images.* but holds 18"),
        ("list_attr_celeba.txt", " -1 ", " 0 ", r"1 or -1 for each attribute, but holds 18, with \[-1  0  1\]"),
        ("list_attr_celeba.txt", " -1 ", " ", r"Cannot read .*list_attr_celeba\.txt"),
        ("list_attr_celeba.txt", "Goatee", "Beard", r"CelebA's 40 attributes .* 'Beard'"),
        ("list_eval_partition.txt", "000003.jpg 0\n", "", "the same images in the same order, but have 18 and 17"),
        ("list_eval_partition.txt", "000003.jpg 0", "000003.jpg train", r"Cannot read .*list_eval_partition\.txt"),
        ("list_eval_partition.txt", "000003.jpg 0", "000003.jpg", r"Cannot read .*list_eval_partition\.txt"),
    ],
)
def test_damaged_lists_are_named(name, old, new, message, root):
    changed(root / "celeba" / name, old, new)
    with pytest.raises(ProblemError, match=message):
        datasets(root)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None, 300])
def test_a_damaged_image_is_named_and_nothing_half_written_stays(content, root):
    path = root / "celeba" / "img_align_celeba" / "000004.jpg"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ProblemError, match=r"Cannot read the image .*000004\.jpg"):
        datasets(root)
    assert not [*(root / "celeba").glob("*64x64*"), *(root / "celeba").glob(".*")]


def test_too_few_or_too_many_samples(root):
    with pytest.raises(UsageError, match="3 training samples are too few"):
        get(NAME, data_root=root, train_samples=3)
    with pytest.raises(UsageError, match=r"celeba has 11 training samples, not 12\. Ask for fewer"):
        datasets(root, train_samples=12)


# The command line.


def test_one_epoch_of_profiling_and_of_training(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(resnet18().state_dict(), "weights.pth")
    problem = [NAME, "--data-root", str(root), "--train-samples", "4", "--pretrained", "weights.pth"]
    for command in (
        ["profile", *problem, "--epochs", "1", "--out", "map.json"],
        ["train", *problem, "--epochs", "1", "--out", "run"],
    ):
        assert main([*command, "--device", "cpu"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "--pretrained weights.pth" in out  # the next command starts from them too
    assert all(f"{attribute} " in out for attribute in ATTRIBUTES) and " error " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "."], "celeba/img_align_celeba"),
        (["--data-root", "nowhere"], "There is no folder nowhere"),
        (["--data-root", "data", "--pretrained", "nowhere.pth"], "There is no file nowhere.pth"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, samples, tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", samples)
    monkeypatch.chdir(tmp_path)
    assert main(["train", NAME, *options, "--device", "cpu", "--out", "run"]) == 2
    assert message in capsys.readouterr().err


def test_weights_of_the_problems_network_do_not_go_with_another(samples, tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", samples)
    monkeypatch.chdir(tmp_path)
    options = ["--data-root", "data", "--pretrained", "weights.pth", "--backbone", "ViT"]
    assert main(["train", NAME, *options, "--out", "run"]) == 2
    assert "--pretrained is for the problem's own network" in capsys.readouterr().err


def test_a_problem_that_takes_no_weights_says_so(capsys):
    assert main(["train", "digits", "--pretrained", "weights.pth", "--out", "run"]) == 2
    assert "does not accept pretrained (--pretrained FILE)" in capsys.readouterr().err
