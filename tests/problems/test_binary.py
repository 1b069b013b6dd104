"""Yes-or-no tasks with missing labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import recon
from recon.errors import ProblemError
from recon.problems.loading import in_order
from recon.problems.tasks.binary import LabelledBatches, accuracy, auc, binary_cross_entropy, binary_task

NAN = float("nan")


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    output = 3 * torch.randn(200, 1, generator=generator)
    target = (torch.rand(200, generator=generator) < output[:, 0].sigmoid()).float()
    target[torch.rand(200, generator=generator) < 0.3] = NAN
    return output, target


def test_the_loss_is_the_mean_over_the_labelled_samples(samples):
    output, target = samples
    output = output.double().requires_grad_()
    labelled = ~target.isnan()
    loss = binary_cross_entropy(output, target)
    p = output.detach()[labelled, 0].sigmoid()
    expected = -torch.where(target[labelled] == 1, p.log(), (1 - p).log()).mean()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    torch.testing.assert_close(output.grad[labelled, 0], (p - target[labelled]) / labelled.sum())
    assert (output.grad[~labelled] == 0).all()
    torch.testing.assert_close(
        binary_cross_entropy(output, torch.ones(200)), F.softplus(-output).mean().squeeze(), check_dtype=False
    )


def test_the_loss_without_any_label_is_nan():
    assert binary_cross_entropy(torch.zeros(3, 1), torch.full((3,), NAN)).isnan()


@pytest.mark.parametrize("shift", [0, 40], ids=["", "logits whose probabilities are 1 in float32"])
def test_metrics_are_those_of_the_labelled_samples(shift, samples):
    output, target = samples
    output = output - output.min() if shift == 0 else output + shift / 2
    metrics = {"auc": auc().make(), "accuracy": accuracy().make()}
    for metric in metrics.values():
        for rows in (slice(0, 90), slice(90, 200)):
            metric.update(output[rows], target[rows])
    known = ~target.isnan().numpy()
    y, z = target.numpy()[known], output[:, 0].numpy()[known]
    assert metrics["auc"].compute().item() == pytest.approx(roc_auc_score(y, z), abs=1e-6)
    assert metrics["accuracy"].compute().item() == pytest.approx(((z > 0) == y).mean(), abs=1e-6)


def test_logits_between_0_and_1_are_no_probabilities():
    metric = accuracy().make()
    metric.update(torch.full((4, 1), 0.3), torch.tensor([1.0, 1, 1, 0]))
    assert metric.compute() == 0.75  # 0.3 > 0: yes
    metric = auc().make()
    for logit, label in ((0.9, 0.0), (2.0, 1.0), (-1.0, 0.0)):  # a batch each
        metric.update(torch.tensor([[logit]]), torch.tensor([label]))
    assert metric.compute() == 1


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


def test_a_batch_leaves_out_the_tasks_without_a_label():
    generator = torch.Generator().manual_seed(0)
    targets = {"a": torch.tensor([1.0, NAN, 0, 1, NAN, NAN]), "b": torch.tensor([NAN, NAN, NAN, NAN, 1, 0])}
    data = LabelledBatches(torch.randn(6, 2, generator=generator), targets)
    loader = in_order(data, 2)
    assert [list(there) for _, there in loader] == [["a"], ["a"], ["b"]]
    model, tasks = Line(), [binary_task("a", auc(), accuracy()), binary_task("b", auc())]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.b.weight.detach().clone()
    history = recon.train(model, list(loader)[:2], {"a": tasks[0].loss}, optimizer=optimizer)
    assert history.steps == 2 and torch.equal(model.b.weight, before)
    losses = {task.name: task.loss for task in tasks}
    (epoch,) = recon.train(model, loader, losses, optimizer=optimizer, method="pcgrad").epochs
    assert all(np.isfinite(loss) for loss in epoch.losses.values()) and not torch.equal(model.b.weight, before)
    results = recon.evaluate(model, loader, tasks)
    with torch.no_grad():
        outputs = model(data.inputs)
    for task in ("a", "b"):
        known = ~targets[task].isnan()
        expected = roc_auc_score(targets[task][known], outputs[task][known, 0])
        assert results[task]["auc"] == pytest.approx(expected)


def test_a_task_without_any_label_is_an_error():
    data = LabelledBatches(torch.zeros(4, 2), {"a": torch.ones(4), "b": torch.full((4,), NAN)})
    with pytest.raises(ProblemError, match="No batch had a target for task 'b'"):
        recon.evaluate(Line(), in_order(data, 2), [binary_task("a", auc()), binary_task("b", auc())])
