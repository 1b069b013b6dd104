import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from recon.errors import CheckpointError, ProblemError, UsageError
from recon.problems import descriptions, get
from recon.problems.files.pascal_mt import PascalMT, collate, edges
from recon.problems.sets import pascal_context
from recon.problems.sets.pascal_context import balanced_cross_entropy, normals_loss
from recon.problems.tasks.pascal_metrics import EdgeF, SaliencyIoU
from recon_cli.main import main

NAME = "pascal-context"
TASKS = ("semseg", "human_parts", "saliency", "normals", "edge")
WALL, PERSON, SKY = 440, 284, 360  # PASCAL-Context's numbers: the sky is in no room
SIZE = 32
HEIGHT, WIDTH = 20, 28
TRAIN, TEST = [f"2008_{number:06}" for number in range(6)], ["2009_000001", "2009_000002", "2010_000003"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pascal_context, "SIZE", SIZE)
    monkeypatch.setattr(pascal_context, "BATCH", 2)


# The archive.


def structs(rows, fields):
    """A struct array of MATLAB, one row."""
    array = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for place, row in enumerate(rows):
        array[0, place] = row
    return array


def anno(name, things):
    """PASCAL-Part's annotation; `things` are `(class, mask, [(part, mask), ...])`."""
    objects = [
        (f"class {number}", number, mask, structs(parts, ("part_name", "mask")) if parts else np.zeros((0, 0)))
        for number, mask, parts in things
    ]
    return {"anno": structs([(name, structs(objects, ("class", "class_ind", "mask", "parts")))], ("imname", "objects"))}


def box(*place):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[place] = 1
    return mask


def things(number):
    """Two humans and a horse in every other image, in the others a human without parts and the horse."""
    horse = (13, box(slice(0, 4)), [("head", box(slice(0, 2)))])
    if number % 2:
        return [(15, box(slice(4, 9)), []), horse]
    head, arm = ("head", box(slice(4, 9), slice(0, 5))), ("rlarm", box(slice(7, 12), slice(2, 9)))
    return [(15, box(slice(4, 12)), [head, arm]), horse, (15, box(19), [("lfoot", box(19, slice(20, 27)))])]


def sample(number):
    random = np.random.RandomState(number)
    coarse = torch.from_numpy(random.randint(256, size=(1, 3, 2, 3))).float()
    smooth = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic").clamp(0, 255).byte()
    classes = np.repeat(np.repeat(random.choice([WALL, PERSON, SKY], size=(4, 4)), 5, axis=0), 7, axis=1)
    return {
        "image": smooth[0].permute(1, 2, 0).numpy(),
        "classes": classes.astype(np.uint16),
        "semseg": random.choice([0, 3, 15, 20, 255], size=(HEIGHT, WIDTH)).astype(np.uint8),
        "saliency": random.randint(256, size=(HEIGHT, WIDTH)).astype(np.uint8),
        "normals": random.randint(256, size=(HEIGHT, WIDTH, 3)).astype(np.uint8),
    }


def write(root):
    folder = root / "PASCAL_MT"
    for place in (*pascal_context.FOLDERS, "semseg/VOC12", "semseg/pascal-context", "ImageSets/Context"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(TRAIN + TEST):
        data = sample(number)
        Image.fromarray(data["image"]).save(folder / "JPEGImages" / f"{name}.jpg", quality=98)
        savemat(folder / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": data["classes"]})
        labels = Image.fromarray(data["semseg"])
        if number % 3:  # VOC's have a palette; where there are both, they are the ones to take
            Image.new("L", labels.size).save(folder / "semseg" / "pascal-context" / f"{name}.png")
            labels = labels.convert("P")
            labels.putpalette([7 * value % 256 for value in range(768)])
        labels.save(folder / "semseg" / ("VOC12" if number % 3 else "pascal-context") / f"{name}.png")
        savemat(folder / "human_parts" / f"{name}.mat", anno(name, things(number)), do_compression=True)
        Image.fromarray(data["saliency"]).save(folder / "sal_distill" / f"{name}.png")
        Image.fromarray(data["normals"]).save(folder / "normals_distill" / f"{name}.png")
    (folder / "ImageSets" / "Context" / "train.txt").write_text("\n".join(TRAIN))
    (folder / "ImageSets" / "Context" / "val.txt").write_text("\n".join(TEST) + "\n")
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def read(root, number, mirrored=False):
    return PascalMT(root / "PASCAL_MT", TRAIN + TEST, SIZE)[number, mirrored]


# What is read.


@pytest.mark.parametrize("number", [0, 1, 6])
def test_a_sample_is_padded_on_the_right_and_below(number, archive):
    data, (image, targets) = sample(number), read(archive, number)
    inside, outside = (slice(HEIGHT), slice(WIDTH)), torch.ones(SIZE, SIZE, dtype=torch.bool)
    outside[inside] = False
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    shown = (image * std + mean)[:, :HEIGHT, :WIDTH] * 255
    assert (shown - torch.from_numpy(data["image"]).permute(2, 0, 1)).abs().mean() < 4  # what JPEG loses
    assert not image[:, outside].any() and not targets["normals"][:, outside].any()
    assert set(targets) == set(TASKS)
    for task in set(TASKS) - {"normals"}:
        assert targets[task].shape == (SIZE, SIZE) and (targets[task][outside] == 255).all()
    assert (targets["semseg"][inside].numpy() == data["semseg"]).all()
    assert (targets["saliency"][inside].numpy() == (data["saliency"] / 255 > 0.5)).all()


@pytest.mark.parametrize("number", [0, 4])
def test_parts_of_all_humans_later_ones_over_earlier_ones(number, archive):
    expected = np.zeros((HEIGHT, WIDTH))
    expected[4:9, 0:5] = 1  # a head
    expected[7:12, 2:9] = 4  # a lower arm
    expected[19, 20:27] = 6  # a foot, of the lower legs
    assert (read(archive, number)[1]["human_parts"][:HEIGHT, :WIDTH].numpy() == expected).all()


def test_without_an_annotated_part_no_pixel_counts(archive):
    assert (read(archive, 1)[1]["human_parts"] == 255).all()


def test_normals_are_unit_vectors_where_the_class_is_one_of_rooms(archive):
    data, (_, targets) = sample(0), read(archive, 0)
    assert set(np.unique(data["classes"])) == {WALL, PERSON, SKY}
    for y in range(HEIGHT):
        for x in range(WIDTH):
            given = 2 * data["normals"][y, x].astype(float) / 255 - 1
            expected = 0 * given if data["classes"][y, x] == SKY else given / np.sqrt((given**2).sum())
            np.testing.assert_allclose(targets["normals"][:, y, x].numpy(), expected, atol=1e-5)


def test_edges_are_one_pixel_wide_and_between_classes(archive):
    classes = np.full((7, 9), 3)
    classes[2:5, 3:6] = 8
    expected = np.zeros((7, 9))
    expected[1, 3:6] = expected[4, 3:6] = 1
    expected[2:5, 2] = expected[2:5, 5] = 1
    assert (edges(classes) == expected).all() and edges(classes).dtype == np.uint8
    assert not edges(np.ones((4, 4))).any()
    assert (read(archive, 2)[1]["edge"][:HEIGHT, :WIDTH].numpy() == edges(sample(2)["classes"])).all()


def test_mirrored_with_normals_that_point_the_other_way(archive):
    (image, targets), (mirrored, others) = read(archive, 0), read(archive, 0, mirrored=True)
    assert torch.equal(mirrored[:, :HEIGHT, :WIDTH].flip(-1), image[:, :HEIGHT, :WIDTH])
    for task in TASKS:
        back = others[task][..., :HEIGHT, :WIDTH].flip(-1)
        back = back * torch.tensor([-1, 1, 1])[:, None, None] if task == "normals" else back
        assert torch.equal(back, targets[task][..., :HEIGHT, :WIDTH]), task


def test_a_batch_lacks_tasks_that_none_of_its_pixels_has_a_target_for(archive):
    with_parts, without, more = (read(archive, number) for number in (0, 1, 3))
    images, targets = collate([with_parts, without])
    assert images.shape == (2, 3, SIZE, SIZE) and set(targets) == set(TASKS)
    assert {task: (target.dtype, target.ndim) for task, target in targets.items()} == {
        "semseg": (torch.int64, 3),
        "human_parts": (torch.int64, 3),
        "saliency": (torch.uint8, 3),
        "normals": (torch.float32, 4),
        "edge": (torch.uint8, 3),
    }
    assert set(collate([without, more])[1]) == set(TASKS) - {"human_parts"}
    outdoors = (without[0], {**without[1], "normals": torch.zeros(3, SIZE, SIZE)})
    assert set(collate([outdoors, outdoors])[1]) == set(TASKS) - {"human_parts", "normals"}


def test_loaders_mirror_and_shuffle_by_seed_to_train(archive):
    def images(seed):
        train, test = get(NAME, data_root=archive).make_loaders(seed)
        return torch.cat([inputs for inputs, _ in train]), torch.cat([inputs for inputs, _ in test])

    (train, test), (same, same_test), (other, _) = images(0), images(0), images(1)
    assert torch.equal(train, same) and torch.equal(test, same_test) and not torch.equal(train, other)
    assert train.shape == (6, 3, SIZE, SIZE)
    assert torch.equal(test, torch.stack([read(archive, number)[0] for number in (6, 7, 8)]))
    known = [read(archive, number, mirrored)[0] for number in range(6) for mirrored in (False, True)]
    seen = [next(place for place, one in enumerate(known) if torch.equal(one, image)) for image in train]
    assert sorted(place // 2 for place in seen) == list(range(6)) and {place % 2 for place in seen} == {0, 1}


# Losses, against what ASTMT's code computes, pixel by pixel.


def binary(seed, shape=(2, 5, 6), ignored=True):
    random = torch.Generator().manual_seed(seed)
    target = (torch.rand(shape, generator=random) < 0.3).to(torch.uint8)
    if ignored:
        target[torch.rand(shape, generator=random) < 0.2] = 255
    return torch.randn(shape[0], 1, *shape[1:], generator=random, dtype=torch.float64), target


@pytest.mark.parametrize("weight", [0.95, None])
@pytest.mark.parametrize("ignored", [False, True])
def test_balanced_cross_entropy(weight, ignored):
    output, target = binary(0, ignored=ignored)
    logits, labels = output[:, 0][target != 255], target[target != 255]
    ones, zeros = logits[labels == 1].tolist(), logits[labels == 0].tolist()
    count = len(ones) + len(zeros)
    share = len(zeros) / count if weight is None else weight
    expected = sum(share * np.log1p(np.exp(-logit)) for logit in ones)
    expected += sum((1 - share) * np.log1p(np.exp(logit)) for logit in zeros)
    actual = balanced_cross_entropy(output, target, *([] if weight is None else [weight]))
    assert actual.item() == pytest.approx(expected / count, rel=1e-12)


def test_normals_are_compared_coordinate_by_coordinate_where_known():
    random = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 3, 4, 5, generator=random, dtype=torch.float64)
    target = F.normalize(target, dim=1)
    target[0, :, 1:3] = 0
    errors = []
    for n, y, x in np.ndindex(2, 4, 5):
        if target[n, :, y, x].any():
            direction = output[n, :, y, x] / output[n, :, y, x].norm()
            errors += (direction - target[n, :, y, x]).abs().tolist()
    assert len(errors) == 3 * 30
    assert normals_loss(output, target).item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_the_losses_have_astmts_weights(archive):
    losses = get(NAME, data_root=archive).losses
    output, target = binary(1)
    plain = balanced_cross_entropy(output, target)
    assert losses["saliency"](output, target) == 5 * plain
    assert losses["edge"](output, target) == 50 * balanced_cross_entropy(output, target, 0.95)
    logits, labels = torch.randn(2, 7, 5, 6, dtype=torch.float64), torch.randint(7, (2, 5, 6))
    torch.testing.assert_close(losses["human_parts"](logits, labels), 2 * F.cross_entropy(logits, labels))
    torch.testing.assert_close(losses["semseg"](logits, labels), F.cross_entropy(logits, labels))
    directions = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(losses["normals"](directions, directions), 10 * normals_loss(directions, directions))


# Metrics.


def test_saliency_is_the_mean_over_images_at_the_best_threshold():
    batches = [binary(seed) for seed in range(3)]
    batches.append((torch.full((1, 1, 5, 6), -9.0), torch.zeros(1, 5, 6, dtype=torch.uint8)))  # nothing, and none found
    metric = SaliencyIoU()
    for output, target in batches:
        metric.update(output.float(), target)
    means = []
    for threshold in np.linspace(0.2, 0.9, 15):
        ious = []
        for output, target in ((out[0], t) for outs, ts in batches for out, t in zip(outs, ts, strict=True)):
            found = (1 / (1 + np.exp(-output.numpy())) > threshold) & (target.numpy() != 255)
            salient = target.numpy() == 1
            union = (found | salient).sum()
            ious.append((found & salient).sum() / union if union else 1.0)
        means.append(np.mean(ious))
    assert float(metric.compute()) == pytest.approx(max(means), abs=1e-6)


def test_edges_are_judged_pixel_by_pixel_at_the_best_threshold():
    batches = [binary(seed) for seed in range(3)]
    batches.append((torch.rand(1, 1, 5, 6), torch.ones(1, 5, 6, dtype=torch.uint8)))  # could be probabilities
    metric = EdgeF()
    for output, target in batches:
        metric.update(output.float(), target)
    logits = torch.cat([output[:, 0][target != 255].double() for output, target in batches])
    truth = torch.cat([target[target != 255] for _, target in batches]) == 1
    scores = []
    for threshold in np.linspace(0, 1, 99):
        found = logits.sigmoid() >= threshold
        right = (found & truth).sum()
        scores.append(float(2 * right / (found.sum() + truth.sum())))  # of precision and recall
    assert float(metric.compute()) == pytest.approx(max(scores), abs=1e-6)


# The problem.


def test_its_network_and_settings(archive):
    problem = get(NAME, data_root=archive)
    assert problem.name == NAME and problem.description == descriptions()[NAME] and problem.task_names == TASKS
    outputs = problem.make_model()(problem.example_inputs())
    channels = {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3, "edge": 1}
    assert {task: out.shape for task, out in outputs.items()} == {
        task: (2, count, SIZE, SIZE) for task, count in channels.items()
    }
    optimizer = problem.make_optimizer(problem.make_model().parameters())
    scheduler = problem.make_scheduler(optimizer, 13)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4] * 7 + [1e-5] * 3 + [1e-6] * 3)


def test_the_trunk_starts_from_imagenet_weights(archive, tmp_path):
    given = mobilenet_v2().state_dict()
    torch.save(given, tmp_path / "weights.pth")
    model = get(NAME, data_root=archive, pretrained=tmp_path / "weights.pth").make_model()
    trunk = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("features.")}
    assert trunk and all(torch.equal(tensor, given[name]) for name, tensor in trunk.items())
    torch.save(model.heads.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of a mobilenet_v2"):
        get(NAME, data_root=archive, pretrained=tmp_path / "weights.pth").make_model()


def test_the_first_images_only(archive):
    train, test = (loader.dataset for loader in get(NAME, data_root=archive, train_samples=3).make_loaders(0))
    assert train.names == TRAIN[:3] and test.names == TEST


# Wrong input.


@pytest.mark.parametrize("place", ["JPEGImages", "sal_distill", "ImageSets/Context/val.txt"])
def test_missing_files_are_named_with_the_official_sources(place, root):
    (root / "PASCAL_MT" / place).rename(root / "elsewhere")
    with pytest.raises(ProblemError) as caught:
        get(NAME, data_root=root)
    message = str(caught.value)
    assert f"lacks files of pascal-context: PASCAL_MT/{place}. Expected are" in message
    assert "https://cs.stanford.edu/~roozbeh/pascal-context" in message and "voc2010" in message
    assert "https://github.com/facebookresearch/astmt" in message


FIRST = TRAIN[0]


@pytest.mark.parametrize(
    "path",
    [
        f"JPEGImages/{FIRST}.jpg",
        f"pascal-context/trainval/{FIRST}.mat",
        f"semseg/pascal-context/{FIRST}.png",
        f"human_parts/{FIRST}.mat",
        f"sal_distill/{FIRST}.png",
        f"normals_distill/{FIRST}.png",
    ],
)
@pytest.mark.parametrize("kept", [None, 0, 60, "text"])
def test_a_missing_or_damaged_file_is_named(path, kept, root):
    file = root / "PASCAL_MT" / path
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(b"<html>not found</html>" if kept == "text" else file.read_bytes()[:kept])
    with pytest.raises(ProblemError, match=rf"Cannot read .*{file.name}: .* again\."):
        read(root, 0)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (f"pascal-context/trainval/{FIRST}.mat", {"labels": np.zeros((3, 3))}, "KeyError: 'LabelMap'"),
        (f"human_parts/{FIRST}.mat", anno("a", [(15, box(0), [("wing", box(0))])]), "KeyError: 'wing'"),
        (f"human_parts/{FIRST}.mat", {"anno": np.zeros((2, 2))}, "Cannot read"),
        (f"sal_distill/{FIRST}.png", Image.new("L", (WIDTH, 9)), rf"saliency .* 9x{WIDTH} .* has {HEIGHT}x{WIDTH}"),
        (f"normals_distill/{FIRST}.png", Image.new("RGB", (9, 9)), rf"normals .* 9x9 .* has {HEIGHT}x{WIDTH}"),
        (f"semseg/pascal-context/{FIRST}.png", Image.new("L", (WIDTH, HEIGHT), 21), "labels from 0 to 20, or 255"),
        (f"semseg/pascal-context/{FIRST}.png", Image.new("RGB", (WIDTH, HEIGHT)), "labels from 0 to 20, or 255"),
    ],
)
def test_files_of_other_content_are_named(path, content, message, root):
    file = root / "PASCAL_MT" / path
    if isinstance(content, dict):
        savemat(file, content)
    else:
        content.save(file)
    with pytest.raises(ProblemError, match=message) as caught:
        read(root, 0)
    assert FIRST in str(caught.value)


def test_an_image_that_is_too_large_is_named(root):
    with pytest.raises(ProblemError, match=rf"{FIRST} .* has 20x28 pixels, but .* at most 24x24"):
        PascalMT(root / "PASCAL_MT", TRAIN, 24)[0, False]


@pytest.mark.parametrize(("content", "message"), [(b"", "but is empty"), (b"\xff\xfe", "Cannot read .*train.txt")])
def test_a_damaged_list_is_named(content, message, root):
    (root / "PASCAL_MT" / "ImageSets" / "Context" / "train.txt").write_bytes(content)
    with pytest.raises(ProblemError, match=message):
        get(NAME, data_root=root).make_loaders(0)


def test_too_few_or_too_many_samples(archive):
    with pytest.raises(UsageError, match="1 training samples are too few"):
        get(NAME, data_root=archive, train_samples=1)
    with pytest.raises(UsageError, match="pascal-context has 6 training samples, not 7"):
        get(NAME, data_root=archive, train_samples=7).make_loaders(0)


# The command line.


def test_one_epoch_of_profiling_and_of_training(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problem = [NAME, "--data-root", str(archive), "--train-samples", "4"]
    for command in (
        ["profile", *problem, "--epochs", "1", "--out", "map.json"],
        ["train", *problem, "--epochs", "1", "--out", "run"],
    ):
        assert main([*command, "--device", "cpu"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert all(name in out for name in (*TASKS, "mean_iou", "max_iou", "mean_angle", "max_f"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "."], "PASCAL_MT/JPEGImages"),
        (["--data-root", "x"], "no folder x"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", NAME, *options, "--device", "cpu", "--out", "run"]) == 2
    assert message in capsys.readouterr().err
