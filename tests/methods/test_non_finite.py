"""A gradient that is not finite is traced to its task, in its step, before the weights change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recon
from recon.errors import GradientError, NonFiniteError

TASKS = ("a", "b", "c")
METHODS = [
    "joint",
    "uw",
    "famo",
    "gradnorm:layer=body",
    "pcgrad",
    "excessmtl",
    "graddrop",
    "uw+mgda",
    "rotograd:layer=body",
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})

    def forward(self, x):
        h = self.body(x).tanh()
        return {task: head(h).squeeze(1) for task, head in self.heads.items()}


def hidden(output, target):
    """Of a finite value: `where` hides NaN on the way forth, and not on the way back."""
    return torch.where(target.isnan(), 0.0, (output - target) ** 2).mean()


def batches(*spoilt):
    """Four; the third has NaN among the targets of these tasks."""
    stream = torch.Generator().manual_seed(0)
    made = []
    for number in range(4):
        targets = {task: torch.randn(8, generator=stream) for task in TASKS}
        for task in spoilt if number == 2 else ():
            targets[task][:3] = torch.nan
        made.append((torch.randn(8, 4, generator=stream), targets))
    return made


def training(loader, go=recon.train, **settings):
    torch.manual_seed(0)
    net = Net()
    go(net, loader, dict.fromkeys(TASKS, hidden), optimizer=torch.optim.Adam(net.parameters(), 0.01), **settings)
    return net


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("go", [recon.train, recon.profile], ids=["train", "profile"])
def test_the_task_is_named_in_its_step_and_the_weights_are_those_of_before(go, method):
    if go is recon.profile and method.startswith("rotograd"):
        pytest.skip("rotograd cannot be profiled")
    torch.manual_seed(0)
    net = Net()
    losses, optimizer = dict.fromkeys(TASKS, hidden), torch.optim.Adam(net.parameters(), 0.01)
    with pytest.raises(NonFiniteError, match=r"'b'.*torch\.where over NaN") as error:
        go(net, batches("b"), losses, optimizer=optimizer, method=method, epochs=1)
    assert "'a'" not in str(error.value) and "'c'" not in str(error.value)
    expected = training(batches("b")[:2], method=method)
    for p, q in zip(net.heads.parameters(), expected.heads.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_all_tasks_at_fault_are_named_and_so_is_the_step():
    with pytest.raises(NonFiniteError, match="'a', 'c' is not finite in step 3 of epoch 1"):
        training(batches("a", "c"))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_among_those_of_one_step(accumulate):
    with pytest.raises(NonFiniteError, match="'b'"):
        training(batches("b"), accumulate=accumulate)


def test_a_gradient_of_a_head_alone():
    """The aggregator sees the shared parameters only."""
    net = Net()
    losses = dict.fromkeys(TASKS, F.mse_loss) | {
        "c": lambda out, y: F.mse_loss(out, y) + (0 * net.heads["c"].bias).sqrt().sum()
    }
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteError, match="'c'"):
        recon.train(net, batches(), losses, optimizer=torch.optim.SGD(net.parameters(), 0.1), method="cagrad")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_second_look_leaves_no_trace():
    torch.manual_seed(0)
    net = Net()
    net.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    with pytest.raises(NonFiniteError):
        recon.train(net, batches("b"), dict.fromkeys(TASKS, hidden), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    assert net.body[1].num_batches_tracked == 3


def test_an_update_that_overflows_blames_no_task():
    """Each task's gradient fits into float32, and their sum does not."""
    net = Net()
    losses = dict.fromkeys("ab", lambda output, target: (2e38 * net.body.bias).sum() + 0 * output.sum())
    with pytest.raises(NonFiniteError, match="though each task's gradient is"):
        recon.train(net, batches(), losses, optimizer=torch.optim.SGD(net.parameters(), 0.1))


def test_a_loss_that_is_nan_is_named_before_any_gradient():
    with pytest.raises(GradientError, match="The loss of task 'b' is nan in step 1 of epoch 1"):
        net = Net()
        losses = dict.fromkeys(TASKS, F.mse_loss) | {"b": lambda out, y: (out * torch.nan).mean()}
        recon.train(net, batches(), losses, optimizer=torch.optim.SGD(net.parameters(), 0.1), method="pcgrad")


def test_a_loss_that_is_always_zero_is_told_of(caplog):
    losses = dict.fromkeys(TASKS, F.mse_loss) | {"b": lambda out, y: 0 * out.sum()}
    net = Net()
    recon.train(net, batches(), losses, optimizer=torch.optim.SGD(net.parameters(), 0.1), method="pcgrad", epochs=2)
    (told,) = [r.getMessage() for r in caplog.records if "exactly 0" in r.getMessage()]
    assert "['b']" in told


def test_an_evaluation_that_is_nan_is_told_of(caplog):
    with torch.no_grad():
        found = recon.evaluate(Net(), batches("b"), [recon.Task(task, F.mse_loss) for task in TASKS])
    assert found["b"]["loss"] != found["b"]["loss"]
    assert "['b'] is NaN" in caplog.text


AGGREGATORS = [
    "cagrad",
    "mgda",
    "nash-mtl",
    "fairgrad",
    "imtl-g",
    "config",
    "aligned-mtl",
    "upgrad",
    "excessmtl",
    "uw+cagrad",
]


@pytest.mark.parametrize("method", AGGREGATORS)
def test_a_weight_without_meaning_is_nowhere(method, tmp_path):
    def hinge(output, target):
        return F.relu(output - target).mean()

    loader = batches()
    loader[2][1]["c"].fill_(1e3)  # nothing to do
    for number in (0, 1, 3):
        loader[number][1]["c"].fill_(-1e3)
    net = Net()
    recorder = recon.Recorder(tmp_path / "metrics.jsonl")
    losses = dict.fromkeys(TASKS, F.mse_loss) | {"c": hinge}
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    history = recon.train(net, loader, losses, optimizer=optimizer, method=method, recorder=recorder)
    steps = [line["weights"] for line in recon.training.recorder.read_records(recorder.path) if "step" in line]
    assert ["c" in weights for weights in steps] == [True, True, False, True]
    mean = sum(weights["c"] for weights in steps if "c" in weights) / 3
    assert history.epochs[0].weights["c"] == pytest.approx(mean) and mean < 1e3
