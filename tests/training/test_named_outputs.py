"""Models that return tuples, whose outputs get names; and problems with one loss for the whole batch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

import recon
from recon.errors import ProblemError, UsageError
from recon.experiments.inputs import make_model


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Linear(6, 8), nn.Linear(8, 8)
        self.first, self.second = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        x = self.mix(self.stem(x).relu()).relu()
        return self.first(x).squeeze(1), self.second(x).squeeze(1)


LOSSES = {"seg": mse_loss, "depth": mse_loss}
MAE = recon.Metric("mae", MeanAbsoluteError, higher_is_better=False)


def pair():
    torch.manual_seed(0)
    return Pair()


def batches(count=6):
    draw = torch.Generator().manual_seed(1)
    return [(x := torch.randn(8, 6, generator=draw), {"seg": x.sum(1), "depth": -x[:, 0]}) for _ in range(count)]


def test_outputs_get_names_and_everything_else_stays():
    plain, model = pair(), pair()
    assert recon.name_outputs(model, ["seg", "depth"]) is model
    x = torch.randn(3, 6)
    assert list(model(x)) == ["seg", "depth"]
    assert all(torch.equal(a, b) for a, b in zip(model(x).values(), plain(x), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x)["depth"], model(x)["depth"])


def test_named_outputs_from_the_profile_to_one_task(tmp_path):
    model = recon.name_outputs(pair(), ("seg", "depth"))
    cmap = recon.profile(model, batches(), LOSSES, optimizer=torch.optim.SGD(model.parameters(), 0.05), floor=None)
    assert [layer.name for layer in cmap.layers] == ["stem", "mix"]
    x = torch.randn(4, 6)
    branched = recon.convert(model, recon.BranchPlan.per_task(["mix"], ("seg", "depth")), x)
    recon.verify(model, branched, x)
    recon.train(branched, batches(), LOSSES, optimizer=torch.optim.SGD(branched.parameters(), 0.05), method="pcgrad")
    recon.save(branched, tmp_path / "saved")
    loaded = recon.load(tmp_path / "saved", recon.name_outputs(pair(), ("seg", "depth")))
    alone = recon.extract_task(branched, "depth")
    for task in LOSSES:
        assert torch.equal(loaded(x)[task], branched(x)[task])
    assert torch.equal(alone(x)["depth"], branched(x)["depth"])
    assert recon.costs(branched, None, x).macs > recon.costs(model, None, x).macs


@pytest.mark.parametrize(
    ("names", "got"), [(("seg",), "returned 2 outputs"), (("a", "b", "c"), "returned 2 outputs")], ids=["few", "many"]
)
def test_another_number_of_outputs(names, got):
    with pytest.raises(ProblemError, match=got):
        recon.name_outputs(pair(), names)(torch.zeros(1, 6))


def test_what_is_no_tuple():
    with pytest.raises(ProblemError, match="the model returned Tensor"):
        recon.name_outputs(nn.Linear(2, 2), ("seg", "depth"))(torch.zeros(1, 2))
    identity = recon.name_outputs(nn.Identity(), ("seg", "depth"))
    assert identity({"x": 1}) == {"x": 1}  # it has names


@pytest.mark.parametrize("names", ["seg", (), (1, 2), ("seg", "seg")], ids=["string", "none", "numbers", "twice"])
def test_names_that_are_none(names):
    with pytest.raises(UsageError, match="The names of the outputs are"):
        recon.name_outputs(pair(), names)


def test_a_model_without_names_is_told_of_them():
    with pytest.raises(ProblemError, match=r"returned tuple.*recon\.name_outputs\(model"):
        recon.train((model := pair()), batches(1), LOSSES, optimizer=torch.optim.SGD(model.parameters(), 0.1))


# In a problem


def both(outputs, batch):
    _, targets = batch
    return {task: mse_loss(outputs[task], target) for task, target in targets.items()}


def problem(**options):
    tasks = [recon.Task("seg", metrics=[MAE]), recon.Task("depth", metrics=[MAE])]
    how = {"make_model": pair, "make_loaders": lambda seed: (batches(), batches(2)), "output_names": ("seg", "depth")}
    return recon.Problem(**{"name": "pair", "tasks": tasks, "batch_loss": both, **how, **options})


def test_a_problem_with_one_loss_and_a_tuple():
    two = problem()
    model, expected = (
        make_model(two, 0),
        recon.name_outputs(make_model(problem(output_names=None), 0), ("seg", "depth")),
    )
    train, test = two.make_loaders(0)
    recon.train(model, train, two.losses, optimizer=two.make_optimizer(model.parameters()), method="pcgrad")
    recon.train(expected, train, LOSSES, optimizer=two.make_optimizer(expected.parameters()), method="pcgrad")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert set(recon.evaluate(model, test, two.tasks)) == {"seg", "depth"}
    report = recon.check(model, None, two.losses, loader=train, timed=False)
    assert report.ok and set(report.shared) == {"stem", "mix"}
    alone = two.losses_of(["depth"])
    history = recon.train(model, train, alone, optimizer=two.make_optimizer(model.parameters()))
    assert list(history.epochs[0].losses) == ["depth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_loss": 3}, "batch_loss of problem 'pair' is 3"),
        ({"batch_loss": None}, "Task 'seg' of problem 'pair' has no loss"),
        ({"tasks": [recon.Task("seg"), recon.Task("depth", metrics=[MAE])]}, "task 'seg' has no metric"),
        (
            {"tasks": [recon.Task("seg", mse_loss, [MAE]), recon.Task("depth", metrics=[MAE])]},
            "'seg' has a loss of",
        ),
        ({"output_names": ("seg", "normals")}, "without the task 'depth'"),
    ],
    ids=["number", "no-loss", "no-metric", "two-losses", "other-names"],
)
def test_problems_that_do_not_fit_together(options, message):
    with pytest.raises(ProblemError, match=message):
        problem(**options)
    with pytest.raises(UsageError, match="names of the outputs are"):
        problem(output_names="seg")


def test_the_command_line_takes_such_a_problem(tmp_path, monkeypatch, capsys):
    from recon_cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair.py").write_text("from tests.training.test_named_outputs import problem  # noqa: F401\n")
    for line in (
        "check pair.py:problem",
        "profile pair.py:problem --epochs 1 --floor off --clip 1 --amp bf16 --accumulate 2 --out map.json",
        "convert pair.py:problem --layers mix --out branched",
        "train pair.py:problem --model branched --epochs 1 --method cagrad --out run",
        "train pair.py:problem --single-task --epochs 1 --out single",
        "compare run single",
        "evaluate pair.py:problem --model run",
    ):
        code = main([*line.split(), *(["--device", "cpu"] if "compare" not in line else [])])
        out, err = capsys.readouterr()
        assert code == 0, (line, out, err)
    made_by = recon.ConflictMap.load("map.json").made_by
    assert (made_by["clip"], made_by["amp"], made_by["accumulate"]) == (1.0, "bf16", 2)
