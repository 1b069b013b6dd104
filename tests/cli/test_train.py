"""`recon train` as a user runs a real training: options, best epoch, interruptions, other networks."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import recon
from recon.errors import ProblemError, UsageError
from recon.experiments.optimizers import make_optimizer, make_scheduler
from recon.experiments.recipe import Recipe
from recon.experiments.run import Run
from recon.experiments.training.evaluations import Evaluations
from tests.zoo import ZOO

PROBLEM = """
import os, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanAbsoluteError

from recon.models import SmallResNet
from recon.problems.problem import Metric, Problem, Task
from recon.problems.loading import TensorBatches, in_order, shuffled


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)
        self.mix = nn.Linear(width, 6)
        self.heads = nn.ModuleDict({"up": nn.Linear(6, 1), "down": nn.Linear(6, 1)})

    def forward(self, x):
        x = self.mix(self.drop(self.norm(self.stem(x)).relu())).relu()
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def wide():
    return Net(16)


def headless():
    return nn.Linear(6, 1)


def a_number():
    return 5


class Sparse:
    '''Batches with random noise, some of which lack a task, or all of them.'''

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for number, (x, targets) in enumerate(self.loader):
            drawn.append(1)
            if len(drawn) == int(os.environ.get("STOP_AT", 0)):
                time.sleep(3600)
            time.sleep(float(os.environ.get("PAUSE", 0)))
            lacking = {1: ["up"], 3: ["up", "down"]}.get(number, [])
            yield x + 0.1 * torch.randn_like(x), {t: None if t in lacking else y for t, y in targets.items()}


def make_loaders(seed):
    x = torch.randn(56, 6, generator=torch.Generator().manual_seed(0))
    data = TensorBatches(x, {"up": x.sum(1), "down": x[:, 0] - x[:, 1]})
    return Sparse(shuffled(data, 8, seed)), in_order(data, 28)


calls = []
drawn = []


def crashing(output, target):
    calls.append(1)
    if len(calls) == int(os.environ.get("CRASH_AT", 0)):
        raise {"crash": RuntimeError("the machine is switched off"), "ctrl-c": KeyboardInterrupt()}[os.environ["HOW"]]
    return mse_loss(output, target)


def problem(**changes):
    calls.clear()
    error = Metric("error", MeanAbsoluteError, higher_is_better=False)
    tasks = [Task("up", crashing, [error]), Task("down", crashing, [error])]
    return Problem(**{**dict(name="tiny", tasks=tasks, make_model=Net, make_loaders=make_loaders, epochs=3), **changes})


def lbfgs():
    return problem(make_optimizer=lambda parameters: torch.optim.Rprop(parameters, lr=0.01))


def pictures():
    def loaders(seed):
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        data = TensorBatches(x, {"left": (x[:, 0].mean((1, 2)) > 0).long(), "right": x.mean((1, 2, 3)).gt(0).long()})
        return shuffled(data, 8, seed), in_order(data, 16)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"left": nn.Linear(192, 2), "right": nn.Linear(192, 4)})

        def forward(self, x):
            return {task: head(x.flatten(1)) for task, head in self.heads.items()}

    tasks = [Task("left", cross_entropy), Task("right", cross_entropy)]
    return Problem("pictures", tasks, Flat, loaders, epochs=1)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.py").write_text(PROBLEM)
    return folder


@pytest.fixture
def crash(command, monkeypatch):
    """Runs a command line that is saved after every step and comes to grief at a call of a loss."""
    train = recon.train

    def crash(line, at, how="crash"):
        monkeypatch.setenv("CRASH_AT", str(at))
        monkeypatch.setenv("HOW", how)
        monkeypatch.setattr(recon.training, "train", partial(train, checkpoint_seconds=0.0))
        code, _, err = command(line)
        monkeypatch.delenv("CRASH_AT")
        monkeypatch.setattr(recon.training, "train", train)
        assert code == 1
        return err

    return crash


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def what_is_left(folder):
    """Everything in a run's folder but times, and the pictures' bytes."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".jsonl":
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(path.parent)]
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("seconds_per_step", None)
            for epoch in content.get("history", []):
                epoch.pop("seconds")
            found[name] = content
        else:
            found[name] = path.name
    return found


RESUMED = {
    "plain": (
        "--method uw --optimizer sgd --lr 0.05 --momentum 0.9 --schedule cosine --warm-up 3 --accumulate 2 --clip 1",
        (7, 9, 4),
    ),
    "branched": ("--model branched --method pcgrad --weight-decay 0.01 --evaluate-every 2 --amp bf16", (13, 7)),
    "single-task": ("--single-task --optimizer adamw --schedule one-cycle", (8, 14, 3)),
}


@pytest.mark.parametrize("form", RESUMED)
def test_an_interrupted_training_ends_as_if_it_had_not_been(files, command, ask, crash, form):
    options, crashes = RESUMED[form]
    if form == "branched" and not (files / "branched").exists():
        ask("convert tiny.py:problem --layers stem --no-verify --out branched")
    whole = ask(f"train tiny.py:problem {options} --out whole-{form}")
    line = f"train tiny.py:problem {options} --out {form}"
    err = crash(line, crashes[0])
    assert "training.checkpoint keeps the training. Go on with:\n  recon train" in err
    for at in crashes[1:]:
        assert "Resuming from" in crash(f"{line} --resume", at)
    code, out, err = command(f"{line} --resume --json")
    assert code == 0
    resumed = json.loads(out)
    assert what_is_left(files / form) == what_is_left(files / f"whole-{form}")
    for key in ("results", "best", "mean_weights", "static_weights"):
        assert resumed[key] == whole[key]
    assert not list((files / form).rglob("*.checkpoint"))
    # And once more, which is no work at all.
    code, out, err = command(f"{line} --resume --json")
    assert code == 0 and f"{form} is finished; there is nothing to resume." in err and "epoch 1/" not in err
    assert json.loads(out) == resumed
    code, _, err = command(f"{line} --resume --seed 3")
    assert code == 2 and "another run, and finished: its --seed is 0, not 3" in err


def test_killed_before_anything_was_saved_it_begins(files, ask, command):
    line = "train tiny.py:problem --epochs 1 --out begun"
    ask(line)
    (files / "begun" / ".lock").write_text("process 1 on a machine")
    os.utime(files / "begun" / "run.json", (1e9, 1e9))
    code, _, err = command(f"{line} --seed 3 --resume")
    assert code == 0 and "epoch 1/1" in err
    assert ask("evaluate tiny.py:problem --model begun")
    assert json.loads((files / "begun" / "run.json").read_text())["seed"] == 3
    assert not (files / "begun" / ".lock").exists()


UNITS = {
    "convert": ("convert tiny.py:problem --layers stem --no-verify", ["run.json", "plan.json", "weights.safetensors"]),
    "train": ("train tiny.py:problem --method pcgrad", ["run.json", "weights.safetensors", "best/run.json"]),
}


@pytest.mark.parametrize("verb", UNITS)
def test_over_an_older_run_all_is_new_or_nothing(files, ask, command, monkeypatch, verb):
    """A disk that is full when the first weights are written leaves the older run, record and all."""
    line, replaced = UNITS[verb]
    folder = files / f"unit-{verb}"
    ask(f"train tiny.py:problem --out {folder.name}")
    (folder / "notes.txt").write_text("mine")
    kept = ["run.json", "weights.safetensors", "best/run.json", "best/weights.safetensors"]
    before = {name: (folder / name).read_bytes() for name in kept}

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("recon.support.files.weights.save_model", full)
        code, _, err = command(f"{line} --out {folder.name}")
    assert code == 1 and "No space left on device. Free some space" in err and "Traceback" not in err
    assert {name: (folder / name).read_bytes() for name in kept} == before
    assert not list(folder.glob(".*")) and not (folder / "plan.json").exists()
    ask(f"evaluate tiny.py:problem --model {folder.name}")
    (folder / "training.checkpoint").unlink(missing_ok=True)
    ask(f"{line} --out {folder.name}")
    assert all((folder / name).read_bytes() != before.get(name) for name in replaced)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "best").exists() == (verb == "train")  # of the model that is there, or of none


def test_convert_leaves_an_interrupted_training_alone(files, crash, command):
    crash("train tiny.py:problem --out half", 20)
    code, _, err = command("convert tiny.py:problem --layers stem --out half")
    assert code == 2 and "half keeps an interrupted training" in err


def test_tasks_that_are_finished_are_not_trained_again(files, command, crash):
    line = "train tiny.py:problem --single-task --out singles"
    crash(line, 18)  # 15 steps of the task up have a target
    code, _, err = command(f"{line} --resume")
    assert code == 0
    assert "Resuming from singles/up/training.checkpoint: after epoch 3" in err and "up: epoch" not in err
    assert "down: epoch 1/3" in err


def test_control_c_loses_nothing(files, crash, command):
    line = "train tiny.py:problem --out stopped"
    err = crash(line, 20, "ctrl-c")
    assert "error: Interrupted. stopped holds the model after epoch 1 of 3. stopped/training.checkpoint keeps" in err
    assert f"recon {line} --resume" in err
    before = (files / "stopped" / "training.checkpoint").read_bytes()
    code, _, err = command(line)
    assert code == 2 and "stopped/training.checkpoint exists already" in err and "--resume" in err
    code, _, err = command("train tiny.py:problem --single-task --out stopped")
    assert code == 2 and "stopped/training.checkpoint is of another training" in err
    for options, words in (
        ("--seed 1", "--seed is 1 now, but was 0"),
        ("--lr 0.5", "--lr is 0.5 now, but was not given"),
        ("--clip 2", "clip is 2.0 now, but was not given"),
        ("--method uw", "method is uw now, but was joint"),
        ("--single-task", "is of another training"),
    ):
        code, _, err = command(f"{line} --resume {options}")
        assert code == 2 and words in err, err
    assert (files / "stopped" / "training.checkpoint").read_bytes() == before
    (files / "stopped" / "training.checkpoint").write_bytes(before[: len(before) // 2])
    code, _, err = command(f"{line} --resume")
    assert code == 2 and "damaged, truncated" in err


def test_a_training_without_a_schedule_may_grow(files, ask, crash):
    crash("train tiny.py:problem --out longer", 20)
    assert len(ask("train tiny.py:problem --out longer --resume --epochs 4")["history"]) == 4


def test_one_with_a_schedule_may_not(files, command, crash):
    crash("train tiny.py:problem --schedule cosine --out fixed", 20)
    code, _, err = command("train tiny.py:problem --schedule cosine --out fixed --resume --epochs 4")
    assert code == 2 and "belongs to another training" in err


def test_killed_at_any_moment_it_goes_on(files, ask, tmp_path):
    whole = ask("train tiny.py:problem --method pcgrad --out killed-whole")
    line = ["train", "tiny.py:problem", "--method", "pcgrad", "--out", "killed", "--resume"]
    code = (
        # As many threads as here: sums in another order round otherwise.
        f"import sys, functools, torch, recon; torch.set_num_threads({torch.get_num_threads()});"
        "recon.training.train = functools.partial(recon.training.train, checkpoint_seconds=0.0);"
        "from recon_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    chance = random.Random(3)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *line],
            cwd=files,
            env={**os.environ, "PAUSE": "0.1", "STOP_AT": "8"},  # never at the end
            stderr=subprocess.DEVNULL,
        )
        while not (files / "killed" / "training.checkpoint").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0.2, 0.6))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert ask(" ".join(line))["results"] == whole["results"]
    assert what_is_left(files / "killed") == what_is_left(files / "killed-whole")


def test_the_best_epoch_is_kept_beside_the_last(files, ask, command):
    out = ask("train tiny.py:problem --lr 0.2 --epochs 6 --out peak")
    history = [epoch["results"] for epoch in out["history"]]
    assert len(history) == 6 and out["results"] == history[-1]
    gains = [sum((history[0][t]["error"] - r[t]["error"]) / history[0][t]["error"] for t in r) / 2 for r in history]
    best = gains.index(max(gains))
    assert 0 < best < 5, "choose another learning rate: this test needs a best epoch in the middle"
    assert out["best"] == {t: {"epoch": best + 1, "results": history[best][t]} for t in ("up", "down")}
    assert ask("evaluate tiny.py:problem --model peak/best")["results"] == history[best]
    assert ask("evaluate tiny.py:problem --model peak")["results"] == history[-1]
    assert Run.load(files / "peak" / "best").results == history[best] and Run.load(files / "peak" / "best").finished
    code, text, err = command("train tiny.py:problem --lr 0.2 --epochs 6 --out peak")
    assert code == 0 and "last (epoch 6)" in text and f"{history[best]['up']['error']:.4f}" in text
    assert err.count("; test up error") == 6


def test_best_by_a_metric_and_evaluations_now_and_then(files, ask):
    out = ask("train tiny.py:problem --lr 0.2 --epochs 5 --evaluate-every 2 --best-by down.error --out by")
    assert [epoch["number"] for epoch in out["history"] if epoch["results"]] == [2, 4, 5]
    errors = {epoch["number"]: epoch["results"]["down"]["error"] for epoch in out["history"] if epoch["results"]}
    assert out["best"]["up"]["epoch"] == min(errors, key=errors.get)
    # Looking at the test data changes nothing.
    every = ask("train tiny.py:problem --lr 0.2 --epochs 5 --out each")
    assert every["results"] == out["results"]
    assert [epoch["losses"] for epoch in every["history"]] == [epoch["losses"] for epoch in out["history"]]


def test_which_epoch_is_best():
    higher = {"a": {"acc": True, "loss": False}, "b": {"loss": False}}

    def epoch(number, acc, loss, other):
        return {"number": number, "results": {"a": {"acc": acc, "loss": loss}, "b": {"loss": other}}}

    history = [epoch(1, 0.5, 2.0, 4.0), {"number": 2, "results": {}}, epoch(3, 0.6, 2.0, 3.0), epoch(4, 0.5, 1.0, 4.0)]
    # (0.1/0.5 + 0) / 2 = 0.1 and 0.25: 0.175 on the mean; then (0 + 0.5) / 2 = 0.25 and 0: 0.125.
    assert Evaluations().best(history, higher)["number"] == 3
    assert Evaluations(best_by="a.loss").best(history, higher)["number"] == 4
    assert Evaluations(best_by="a.acc").best(history[::-1], higher)["number"] == 3
    assert Evaluations().best([*history, epoch(5, None, 0.1, 0.1), epoch(6, math.nan, 0.1, 0.1)], higher)["number"] == 3
    assert Evaluations().best([epoch(1, 0.0, 2.0, 4.0), epoch(2, 0.2, 2.0, 4.0)], higher)["number"] == 2
    assert Evaluations().best([{"number": 1, "results": {}}], higher) is None
    assert [n for n in range(1, 8) if Evaluations(every=3).due(n, 7)] == [3, 6, 7]


@pytest.mark.parametrize("method", ["joint", "dwa:temperature=1.0", "mgda"])
def test_weights_of_every_step_are_recorded_drawn_and_averaged(files, ask, command, method):
    name = method.partition(":")[0]
    out = ask(f"train tiny.py:problem --method {method} --out weights-{name}")
    steps = [line for line in metrics(files / f"weights-{name}") if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, 19))  # 7 batches, of which one has no target at all
    means = {}
    for task in ("up", "down"):
        weights = [line["weights"][task] for line in steps if task in line["weights"]]
        labelled = sum(task in line["losses"] for line in steps)
        assert labelled == (15 if task == "up" else 18)
        assert len(weights) == labelled or (name == "mgda" and 0 < len(weights) < labelled)  # a loss may reach 0
        means[task] = sum(weights) / len(weights)
    assert out["mean_weights"] == pytest.approx(means)
    assert out["static_weights"] == f"joint:weights={means['up']:.4g}/{means['down']:.4g}"
    picture = files / f"weights-{name}" / "weights.png"
    code, text, _ = command(f"train tiny.py:problem --method {method} --out weights-{name}")
    assert code == 0
    if name == "joint":
        assert not picture.exists() and "--method joint:weights" not in text
    else:
        assert picture.read_bytes().startswith(b"\x89PNG") and f"--method {out['static_weights']}" in text


def test_clipping_accumulation_and_optimizer_reach_the_training(files, ask):
    ask("train tiny.py:problem --epochs 1 --optimizer sgd --lr 0.5 --clip 0.01 --accumulate 7 --seed 2 --out once")
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    torch.manual_seed(2)
    fresh = dict(problem.make_model().named_parameters())
    saved = recon.load(files / "once", problem.make_model())
    moved = [(value - fresh[name]).flatten() for name, value in saved.named_parameters()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)  # one step, of that length
    (line, _) = metrics(files / "once")
    assert line["lr"] == 0.5 and Run.load(files / "once").settings["--clip"] == 0.01


def schedule(epochs=4, batches=10, problem=None, lr=0.8, **options):
    """The learning rates of all steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    problem = problem or recon.problems.get("digits")
    make = make_scheduler(problem, [None] * batches, epochs, Recipe(**options))
    scheduler = make(optimizer) if make else None
    rates = []
    for _ in range(-(-batches // options.get("accumulate", 1)) * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")
def test_schedules_and_warm_up_against_their_formulas():
    def cosine(step, steps):
        return 0.8 * (1 + math.cos(math.pi * step / steps)) / 2

    rise = [0.8 * (k + 1) / 5 for k in range(5)]
    assert schedule(schedule="constant") == [0.8] * 40
    assert schedule(schedule="cosine") == pytest.approx([cosine(k, 40) for k in range(40)])
    assert schedule(schedule="cosine", accumulate=3) == pytest.approx([cosine(k, 16) for k in range(16)])
    assert schedule(schedule="cosine", warm_up=5) == pytest.approx(rise + [cosine(k, 35) for k in range(35)])
    assert schedule(schedule="constant", warm_up=5) == pytest.approx(rise + [0.8] * 35)
    assert schedule(schedule="constant", warm_up=0.125) == pytest.approx(rise + [0.8] * 35)
    expected = [0.8] * 10 + [0.4] * 20 + [0.2] * 10
    assert schedule(schedule="step", milestones=(1, 3), gamma=0.5) == pytest.approx(expected)
    expected[:5] = rise
    assert schedule(schedule="step", milestones=(1, 3), gamma=0.5, warm_up=5) == pytest.approx(expected)
    for options, peak in (({}, 11), ({"warm_up": 0.5}, 19), ({"warm_up": 8}, 7)):
        rates = schedule(schedule="one-cycle", **options)
        assert rates.index(max(rates)) == peak and max(rates) == pytest.approx(0.8)
        assert rates[0] == pytest.approx(0.8 / 25) and rates[-1] < 1e-4


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")
def test_the_problem_s_own_schedule_is_the_default_and_takes_a_warm_up():
    asked = []

    def halves(optimizer, steps):
        asked.append(steps)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    problem = replace(recon.problems.get("digits"), make_scheduler=halves)
    assert schedule(1, 3, problem) == pytest.approx([0.8, 0.4, 0.2])
    assert schedule(1, 5, problem, warm_up=2) == pytest.approx([0.4, 0.8, 0.8, 0.4, 0.2])
    assert asked == [3, 3]
    assert schedule(1, 3, problem, schedule="constant") == [0.8] * 3


def test_schedules_that_cannot_be():
    digits = recon.problems.get("digits")
    with pytest.raises(UsageError, match="A warm-up of 40 would take all 40 steps"):
        schedule(schedule="cosine", warm_up=40)
    with pytest.raises(UsageError, match=r"The warm-up takes 10 steps, but the first milestone comes after 10 steps"):
        schedule(schedule="step", milestones=(1, 3), warm_up=10)
    with pytest.raises(ProblemError, match="the train loader of 'digits' has no length"):
        make_scheduler(digits, iter([]), 4, Recipe(schedule="cosine"))
    assert make_scheduler(digits, iter([]), 4, Recipe(schedule="constant", warm_up=3)) is not None
    assert make_scheduler(digits, iter([]), 4, Recipe(schedule="constant")) is None


def test_optimizers():
    digits = recon.problems.get("digits")
    model = digits.make_model()
    sgd = make_optimizer(digits, model, Recipe(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.01))
    assert type(sgd) is torch.optim.SGD
    assert {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}.items() <= sgd.param_groups[0].items()
    adamw = make_optimizer(digits, model, Recipe(optimizer="adamw"))
    expected = torch.optim.AdamW(model.parameters()).param_groups[0]
    assert all(adamw.param_groups[0][name] == value for name, value in expected.items() if name != "params")
    own = make_optimizer(digits, model, Recipe(weight_decay=0.5))
    assert type(own) is type(digits.make_optimizer(model.parameters())) and own.param_groups[0]["weight_decay"] == 0.5


def test_optimizers_of_sparse_tables():
    digits = recon.problems.get("digits")
    model = ZOO["SparseTables"].make()
    tables, rest = make_optimizer(digits, model, Recipe(optimizer="adamw", lr=0.3))
    assert (type(tables), type(rest)) == (torch.optim.SparseAdam, torch.optim.AdamW)
    assert [p.shape for p in tables.param_groups[0]["params"]] == [(7, 4), (7, 4)]
    assert tables.param_groups[0]["lr"] == rest.param_groups[0]["lr"] == 0.3
    assert len(rest.param_groups[0]["params"]) == len(list(model.parameters())) - 2
    assert type(make_optimizer(digits, model, Recipe(optimizer="sgd", lr=0.3))) is torch.optim.SGD


def test_another_network(files, ask, command, tmp_path, monkeypatch):
    ask("train tiny.py:problem --model tiny.py:wide --epochs 1 --out wide")
    assert load_file(files / "wide" / "weights.safetensors")["stem.weight"].shape == (16, 6)
    results = Run.load(files / "wide").results
    own = "--backbone tiny.py:wide"  # named each time: a record imports nothing
    for folder in ("wide", "wide/best"):
        assert ask(f"evaluate tiny.py:problem {own} --model", folder)["results"] == results
    assert ask(f"train tiny.py:problem {own} --model wide --epochs 1 --out wider")["backbone"].endswith("tiny.py:wide")
    ask("train tiny.py:problem --model tiny.py:wide --single-task --epochs 1 --out wides")
    assert set(ask(f"evaluate tiny.py:problem {own} --model wides")["results"]) == {"up", "down"}
    out = ask("train tiny.py:pictures --model SmallResNet --out pictures")
    weights = load_file(files / "pictures" / "weights.safetensors")
    assert weights["stem.conv.weight"].shape == (8, 3, 3, 3) and out["backbone"] == "SmallResNet"
    assert weights["heads.left.weight"].shape[0] == 2 and weights["heads.right.weight"].shape[0] == 4
    assert ask("evaluate tiny.py:pictures --model pictures")["results"] == out["results"]


WRONG = {
    "clip of zero": ("--clip 0", "above 0"),
    "nothing to accumulate": ("--accumulate 0", "at least 1"),
    "an unknown optimizer": ("--optimizer sdg", "'sgd'"),
    "an unknown schedule": ("--schedule cosin", "'cosine'"),
    "milestones without a schedule": ("--milestones 1 2", "belong to the schedule step"),
    "gamma without a schedule": ("--schedule cosine --gamma 0.5", "belong to the schedule step"),
    "steps without milestones": ("--schedule step", "needs milestones"),
    "milestones that fall": ("--schedule step --milestones 2 1", "must increase"),
    "milestones behind the end": ("--schedule step --milestones 1 3", "below the 3 epochs"),
    "momentum of adam": ("--optimizer adam --momentum 0.9", "momentum is a setting of sgd"),
    "momentum of the problem's adam": ("--momentum 0.9", "is Adam, which has no momentum"),
    "too much momentum": ("--optimizer sgd --momentum 1", "below 1"),
    "negative weight decay": ("--weight-decay -1", "at least 0"),
    "a warm-up of nothing": ("--warm-up 0", "at least 1"),
    "a warm-up beyond the end": ("--warm-up 1.5", "a part between 0 and 1"),
    "a warm-up as long as the training": ("--schedule cosine --warm-up 21", "would take all 21 steps"),
    "evaluations never": ("--evaluate-every 0", "at least 1"),
    "best by an unknown metric": ("--best-by up.eror", "Did you mean 'up.error'"),
    "best by for single tasks": ("--single-task --best-by up.error", "does not go with --best-by"),
    "an unknown backbone": ("--model SmalResNet", "'SmallResNet'"),
    "a backbone for pictures": ("--model SmallResNet", "takes images (N, C, H, W)"),
    "no such function": ("--model tiny.py:wild", "'wide'"),
    "no module": ("--model tiny.py:a_number", "must return a torch.nn.Module, but it returned int"),
    "a network of another kind": ("--model tiny.py:headless", "must return {task name: output}"),
    "a folder without a model": ("--model ./nowhere", "no model was saved there"),
    "float16 on a CPU": ("--amp fp16 --device cpu", "needs a GPU"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_before_the_training(refused, case):
    options, words = WRONG[case]
    refused(f"train tiny.py:problem {options} --out new", words)


def test_a_setting_that_the_problem_s_optimizer_lacks(refused):
    refused("train tiny.py:lbfgs --weight-decay 0.1 --out new", "is Rprop, which has no weight_decay")


def test_without_tensorboard_the_error_says_how_to_get_it(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command("train tiny.py:problem --tensorboard --out new")
    assert code == 2 and "pip install tensorboard" in err


def test_tensorboard_gets_every_step_and_the_last_ones_only_once(tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars = folder, purge_step, {}
            made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars[name, step] = value

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    from recon.experiments.training.tensorboard import Events

    tell = Events(tmp_path)
    tell({"epoch": 2, "step": 7, "lr": 0.1, "losses": {"a": 1.5}, "weights": {"a": 0.5}})
    tell({"number": 2, "results": {"a": {"error": 0.25}}})
    (writer,) = made
    assert writer.purge_step == 7 and writer.folder == str(tmp_path)
    assert writer.scalars == {
        ("loss/a", 7): 1.5,
        ("weight/a", 7): 0.5,
        ("learning rate", 7): 0.1,
        ("test/a error", 7): 0.25,
    }


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.jsonl", "plan.json", "run.json"])
def test_a_file_of_ones_own_is_no_mark_of_a_run(files, command, name):
    folder = files / f"own-{name}"
    folder.mkdir()
    (folder / name).write_text("mine")
    for line in ("train tiny.py:problem --epochs 1 --out", "convert tiny.py:problem --layers mix --out"):
        code, out, err = command(line, folder)
        assert (code, out) == (2, "")
        assert "would be overwritten" in err or "holds other files" in err
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]
