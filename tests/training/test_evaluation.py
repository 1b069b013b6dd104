import math
from collections import UserDict

import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from recon.errors import ProblemError, UsageError
from recon.problems.problem import Metric, Task
from recon.support.network.forward import batch_parts, model_device, to_device
from recon.training.evaluation import LOSS, delta_m, directions, evaluate

ACCURACY = Metric("accuracy", lambda: MulticlassAccuracy(2, average="micro"))
ERROR = Metric("error", MeanAbsoluteError, higher_is_better=False)
SIGN = Task("sign", nn.functional.cross_entropy, [ACCURACY])
SIZE = Task("size", nn.functional.mse_loss, [ERROR])
BARE = Task("size", nn.functional.mse_loss)


class Guess(nn.Module):
    """Says whether `x` is positive, and that its size is 1."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(1), nn.BatchNorm1d(1)])
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.norms[0](x[:, None])
        return {"sign": torch.stack([-x, x], dim=1), "size": torch.ones_like(x)}


def batch(x, **targets):
    return torch.tensor(x), {task: torch.tensor(target) for task, target in targets.items()}


def test_metrics_count_samples_not_batches():
    loader = [
        batch([1.0, -1.0, 2.0], sign=[1, 0, 1], size=[1.0, 1.0, 1.0]),
        batch([-3.0], sign=[1], size=[3.0]),
    ]
    assert evaluate(Guess(), loader, [SIGN, SIZE]) == {"sign": {"accuracy": 0.75}, "size": {"error": 0.5}}


def test_a_task_is_skipped_where_its_target_is_missing():
    loader = [batch([1.0, 1.0], sign=[1, 0]), batch([5.0], size=[4.0])]
    assert evaluate(Guess(), loader, [SIGN, SIZE]) == {"sign": {"accuracy": 0.5}, "size": {"error": 3.0}}


def test_a_task_without_metrics_reports_its_mean_loss():
    loader = [batch([1.0, 1.0, 1.0], size=[1.0, 1.0, 1.0]), batch([1.0], size=[3.0])]
    assert evaluate(Guess(), loader, [BARE]) == {"size": {LOSS: 1.0}}
    assert directions([BARE, SIGN]) == {"size": {LOSS: False}, "sign": {"accuracy": True}}


def test_a_loss_that_is_nan_stays_visible():
    loader = [batch([1.0], size=[1.0]), batch([1.0], size=[math.nan])]
    assert math.isnan(evaluate(Guess(), loader, [BARE])["size"][LOSS])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Guess()
    model.norms[1].eval()  # as in fine-tuning with a frozen norm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [batch([1.0, 5.0], size=[1.0, 1.0])]
    if fails:
        with pytest.raises(ProblemError):
            evaluate(model, [*loader, "nonsense"], [SIZE])
    else:
        evaluate(model, loader, [SIZE])
    assert model.modes == [(False, False)]
    assert [module.training for module in (model, *model.norms)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_task_that_never_had_a_target():
    with pytest.raises(ProblemError, match=r"No batch had a target for task 'sign'.* were 'size'"):
        evaluate(Guess(), [batch([1.0], size=[1.0])], [SIGN, SIZE])


def test_a_loader_without_batches():
    with pytest.raises(ProblemError, match=r"No batch .* 'size'; the loader's targets were none"):
        evaluate(Guess(), [], [SIZE])


def test_an_output_that_lacks_a_task():
    depth = Task("depth", nn.functional.mse_loss)
    with pytest.raises(ProblemError, match=r"no entry for task 'depth'; its entries are 'sign', 'size'"):
        evaluate(Guess(), [batch([1.0], depth=[1.0])], [depth])


def test_an_output_that_is_no_dict():
    with pytest.raises(ProblemError, match=r"must return \{task name: output\}, but it returned Tensor"):
        evaluate(nn.Identity(), [batch([1.0], size=[1.0])], [SIZE])


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ((torch.zeros(2), torch.zeros(2)), r"\(Tensor, Tensor\)"),
        ([torch.zeros(2)], r"\(Tensor\)"),
        (torch.zeros(2), "Tensor"),
    ],
)
def test_a_batch_of_another_form(wrong, got):
    with pytest.raises(ProblemError, match=rf"must be \(inputs, .* gave {got}\."):
        evaluate(Guess(), [wrong], [SIZE])


def test_a_metric_that_is_not_one_number():
    per_class = Metric("accuracy", lambda: MulticlassAccuracy(2, average="none"))
    task = Task("sign", nn.functional.cross_entropy, [per_class])
    with pytest.raises(ProblemError, match=r"'accuracy' of task 'sign' must be one number.*\(2,\)"):
        evaluate(Guess(), [batch([1.0], sign=[1])], [task])


# Batches.


class Movable:
    device = "cpu"

    def to(self, device):
        self.device = device
        return self


def test_to_device_moves_whatever_can_move():
    tensor = torch.zeros(2)
    moved = to_device(({"x": [tensor, Movable()], "path": "a.png"}, UserDict(n=3)), "meta")
    assert moved[0]["x"][0].device.type == "meta" and moved[0]["x"][1].device == "meta"
    assert moved[0]["path"] == "a.png" and moved[1] == {"n": 3}
    assert tensor.device.type == "cpu"


def test_a_model_is_where_its_state_is():
    assert model_device(nn.Linear(1, 1, device="meta")).type == "meta"
    assert model_device(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert model_device(nn.ReLU()).type == "cpu"


def test_unpack_takes_lists_as_the_default_collate_gives_them():
    [(inputs, targets)] = batch_parts([1, {"a": 2}])
    assert inputs == 1 and targets == {"a": 2}


# Δm.


def test_delta_m_by_hand():
    results = {"seg": {"miou": 44.0, "pix": 70.0}, "depth": {"rmse": 0.6}}
    baselines = {"seg": {"miou": 40.0, "pix": 80.0}, "depth": {"rmse": 0.5}}
    better = {"seg": {"miou": True, "pix": True}, "depth": {"rmse": False}}
    # seg: (+10 % - 12.5 %) / 2 = -1.25 %; depth: -20 %.
    assert delta_m(results, baselines, better) == pytest.approx((-1.25 - 20) / 2)
    assert delta_m(results, baselines, {"miou": True, "pix": True, "rmse": False}) == pytest.approx(-10.625)


def test_delta_m_of_the_baselines_is_zero():
    results = {"a": {"x": 3.0}, "b": {"y": 0.2}}
    assert delta_m(results, results, {"x": True, "y": False}) == 0


def test_delta_m_keeps_its_sign_where_the_baseline_is_negative():
    assert delta_m({"a": {"loglik": -9.0}}, {"a": {"loglik": -10.0}}, {"loglik": True}) == pytest.approx(10)


@pytest.mark.parametrize(
    ("results", "baselines", "better", "message"),
    [
        ({}, {}, {}, "at least one task"),
        ({"a": {"x": 1.0}}, {"b": {"x": 1.0}}, {"x": True}, r"same tasks.*\['a'\].*\['b'\]"),
        ({"a": {"x": 1.0}}, {"a": {"y": 1.0}}, {"x": True}, r"same metrics of task 'a'.*\['x'\].*\['y'\]"),
        ({"a": {}}, {"a": {}}, {}, "'a' has no metrics"),
        ({"a": {"x": 1.0}}, {"a": {"x": 1.0}}, {"y": True}, "which way metric 'x' of task 'a'"),
        ({"a": {"x": 1.0}}, {"a": {"x": 1.0}}, {"a": {"y": True}}, "which way metric 'x' of task 'a'"),
        ({"a": {"x": 1.0}}, {"a": {"x": 0.0}}, {"x": True}, "'x' of task 'a' is 0"),
    ],
)
def test_delta_m_refuses_what_cannot_be_compared(results, baselines, better, message):
    with pytest.raises(UsageError, match=message):
        delta_m(results, baselines, better)
