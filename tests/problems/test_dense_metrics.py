import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score

from recon.problems.tasks import dense
from recon.problems.tasks import dense_metrics as metrics

CLASSES = 5


def run(metric, *batches):
    state = metric.make()
    for output, target in batches:
        state.update(output, target)
    return state.compute().item()


def labelled(seed, batch=3, absent=()):
    """Logits and labels, some of them ignored, without the classes `absent`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, CLASSES, 6, 7, generator=generator)
    logits[:, list(absent)] = -9.0
    target = torch.randint(CLASSES, (batch, 6, 7), generator=generator)
    for label in absent:
        target[target == label] = 1
    target[torch.rand(target.shape, generator=generator) < 0.3] = dense.IGNORE
    return logits, target


def directions(seed, batch=3, unknown=0.3):
    """Outputs of any length and unit vectors, some of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    output, target = (torch.randn(batch, 3, 6, 7, generator=generator) for _ in range(2))
    output = torch.where(torch.rand(batch, 1, 6, 7, generator=generator) < 0.5, target + 0.2 * output, output)
    target = target / target.norm(dim=1, keepdim=True)
    return output, target * (torch.rand(batch, 1, 6, 7, generator=generator) >= unknown)


def depths(seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    output, target = (torch.rand(batch, 1, 6, 7, generator=generator) * 10 + 0.1 for _ in range(2))
    return output, target * (torch.rand(target.shape, generator=generator) >= 0.3)


def flat(batches):
    """numpy arrays (pixels, channels) or (pixels,) of all batches together."""
    return [
        np.concatenate([np.moveaxis(t.double().numpy(), 1, -1).reshape(-1, t.shape[1]) for t in tensors])
        for tensors in zip(*batches, strict=True)
    ]


# Segmentation.


def segmentation_arrays(batches):
    predicted = np.concatenate([logits.argmax(1).flatten().numpy() for logits, _ in batches])
    labels = np.concatenate([target.flatten().numpy() for _, target in batches])
    return predicted[labels != dense.IGNORE], labels[labels != dense.IGNORE]


@pytest.mark.parametrize("absent", [(), (2, 4), (0,)])
def test_segmentation_metrics_are_scikit_learn_s(absent):
    batches = [labelled(seed, batch, absent) for seed, batch in ((0, 3), (1, 1))]
    predicted, labels = segmentation_arrays(batches)
    iou = jaccard_score(labels, predicted, average="macro")  # over the classes that occur
    assert run(metrics.mean_iou(CLASSES, dense.IGNORE), *batches) == pytest.approx(iou)
    accuracy = accuracy_score(labels, predicted)
    assert run(metrics.pixel_accuracy(CLASSES, dense.IGNORE), *batches) == pytest.approx(accuracy)


def test_mean_iou_is_of_the_whole_test_set_not_a_mean_over_batches():
    batches = [labelled(seed, 1) for seed in range(4)]
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    metric = metrics.mean_iou(CLASSES, dense.IGNORE)
    assert run(metric, *batches) == pytest.approx(run(metric, whole))
    assert run(metric, *batches) != pytest.approx(np.mean([run(metric, batch) for batch in batches]), abs=1e-4)


# Depth.


def test_depth_errors_are_means_over_all_known_pixels():
    batches = [depths(0), depths(1, 1)]
    output, target = flat(batches)
    output, target = output[target != 0], target[target != 0]
    assert run(metrics.absolute_error(), *batches) == pytest.approx(np.abs(output - target).mean())
    assert run(metrics.relative_error(), *batches) == pytest.approx((np.abs(output - target) / target).mean())


# Normals.


def test_angles_are_those_between_the_vectors():
    batches = [directions(0), directions(1, 1)]
    output, target = flat(batches)
    output, target = output[target.any(1)], target[target.any(1)]
    # By the law of tangents, not by a cosine.
    sines, cosines = np.linalg.norm(np.cross(output, target), axis=1), (output * target).sum(1)
    angles = np.degrees(np.arctan2(sines, cosines))
    assert run(metrics.mean_angle(), *batches) == pytest.approx(angles.mean(), rel=1e-5)
    middle = np.sort(angles)[(len(angles) - 1) // 2]
    assert run(metrics.median_angle(), *batches) == pytest.approx(middle, abs=0.006)
    for degrees in (11.25, 22.5, 30):
        assert run(metrics.within(degrees), *batches) == pytest.approx((angles < degrees).mean(), rel=1e-5)


@pytest.mark.parametrize("degrees", [0, 45, 90, 135, 180])
def test_angles_at_the_ends(degrees):
    target = torch.tensor([0.0, 0, 1]).reshape(1, 3, 1, 1)
    output = 7 * torch.tensor([np.sin(np.radians(degrees)), 0, np.cos(np.radians(degrees))]).float().reshape(1, 3, 1, 1)
    assert run(metrics.mean_angle(), (output, target)) == pytest.approx(degrees, abs=0.05)
    assert run(metrics.median_angle(), (output, target)) == pytest.approx(degrees, abs=0.05)


def test_an_output_without_direction_is_no_good_one():
    _, target = directions(0, unknown=0)
    for value, median in ((0.0, 90), (torch.nan, 180)):
        output = torch.full_like(target, value)
        assert run(metrics.median_angle(), (output, target)) == pytest.approx(median, abs=0.01)
        assert run(metrics.within(30), (output, target)) == 0
    assert np.isnan(run(metrics.mean_angle(), (output, target)))


# All of them.


def test_which_way_they_improve():
    tasks = [dense.segmentation("s", CLASSES), dense.depth("d"), dense.normals("n")]
    assert {metric.name: metric.higher_is_better for task in tasks for metric in task.metrics} == {
        "mean_iou": True,
        "pixel_accuracy": True,
        "absolute_error": False,
        "relative_error": False,
        "mean_angle": False,
        "median_angle": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
    }


def test_without_a_known_pixel_there_is_no_error():
    zeros = torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)
    for metric in dense.depth("d").metrics:
        assert np.isnan(run(metric, (zeros[0] + 1, zeros[0])))
    for metric in dense.normals("n").metrics:
        assert np.isnan(run(metric, (zeros[1] + 1, zeros[1])))


def test_problems_are_listed_without_torchmetrics():
    code = (
        "import sys, recon.problems.tasks.dense; from recon_cli.main import main; main(['problems']);"
        "assert 'torchmetrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Losses.


def loss_and_gradient(loss, output, target):
    output = output.clone().requires_grad_()
    value = loss(output, target)
    return value.item(), torch.autograd.grad(value, output)[0]


def test_segmentation_loss_is_the_mean_over_the_labelled_pixels():
    logits, target = labelled(0)
    known = target != dense.IGNORE
    probabilities = torch.softmax(logits.double(), 1).gather(1, torch.where(known, target, 0)[:, None])[:, 0]
    value, gradient = loss_and_gradient(dense.segmentation_loss, logits, target)
    assert value == pytest.approx(-probabilities[known].log().mean().item())
    assert not gradient.permute(0, 2, 3, 1)[~known].any() and gradient.permute(0, 2, 3, 1)[known].any(1).all()


def test_depth_loss_is_the_mean_over_the_known_pixels():
    output, target = depths(0)
    value, gradient = loss_and_gradient(dense.depth_loss, output, target)
    known = target != 0
    assert value == pytest.approx((output - target).abs()[known].mean().item())
    torch.testing.assert_close(gradient, torch.sign(output - target) * known / known.sum())


def test_normals_loss_is_one_minus_the_cosine_whatever_the_output_s_length():
    output, target = directions(0)
    known = target.any(1)
    unit = (output / output.norm(dim=1, keepdim=True)).double()
    expected = 1 - (unit * target).sum(1)[known].mean().item()
    for scale in (1, 0.01, 1000):
        assert dense.normals_loss(scale * output, target).item() == pytest.approx(expected, rel=1e-5)
    _, gradient = loss_and_gradient(dense.normals_loss, output, target)
    torch.testing.assert_close((gradient * output).sum(1), torch.zeros(3, 6, 7))  # its length does not matter


@pytest.mark.parametrize(
    ("loss", "output", "target"),
    [
        (dense.segmentation_loss, torch.randn(2, CLASSES, 3, 3), torch.full((2, 3, 3), dense.IGNORE)),
        (dense.depth_loss, torch.randn(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)),
        (dense.normals_loss, torch.randn(2, 3, 3, 3), torch.zeros(2, 3, 3, 3)),
        (dense.normals_loss, torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 3, 3)),
    ],
)
def test_without_a_known_pixel_the_loss_is_0(loss, output, target):
    value, gradient = loss_and_gradient(loss, output, target)
    assert value == 0 and (gradient == 0).all()


def test_an_output_of_zeros_has_a_gradient():
    _, target = directions(0)
    value, gradient = loss_and_gradient(dense.normals_loss, torch.zeros_like(target), target)
    assert value == 1 and gradient.isfinite().all()
