import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import recon
from recon.experiments.inputs import few_samples
from recon.experiments.run import Run
from recon_cli import verbs
from recon_cli.main import VERBS, _parse, main
from tests.ranks import PATIENCE

PROBLEM = """
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

from recon.problems.problem import Metric, Problem, Task
from recon.problems.loading import TensorBatches, in_order, shuffled


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({"up": nn.Linear(6, 1), "down": nn.Linear(6, 1)})

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = self.mix(x).relu()
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def data(seed):
    x = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    target = x.mean((1, 2, 3)) * 4
    return TensorBatches(x, {"up": target, "down": x[:, 0, 0, 0] - 0.5 * target})


def make_loaders(seed):
    return shuffled(data(0), 16, seed), in_order(data(1), 16)


def problem(**changes):
    error = Metric("error", MeanAbsoluteError, higher_is_better=False)
    loss = changes.pop("loss", mse_loss)
    values = dict(
        name="tiny",
        tasks=[Task("up", loss, [error]), Task("down", mse_loss, [error])],
        make_model=Net,
        make_loaders=make_loaders,
        epochs=2,
    )
    return Problem(**{**values, **changes})


def another():
    return problem(name="another")


def chatty():
    print("chatting while importing")

    def make_model():
        print("chatting while training")
        return Net()

    return problem(make_model=make_model)


def explodes():
    def make_model():
        raise AssertionError("the model was made before the arguments were checked")

    return problem(make_model=make_model)


def bad_model():
    class Broken(Net):
        def forward(self, x):
            raise ValueError("forward went wrong")  # the line to name

    return problem(make_model=Broken)


def bad_loader():
    def batches():
        yield from make_loaders(0)[0]
        raise RuntimeError("disk is gone")

    class Loader:
        __iter__ = staticmethod(batches)

    return problem(make_loaders=lambda seed: (Loader(), make_loaders(0)[1]))


def bad_metric():
    class Broken(MeanAbsoluteError):
        def compute(self):
            raise RuntimeError("no metric today")

    tasks = [Task("up", mse_loss, [Metric("error", Broken)]), Task("down", mse_loss)]
    return problem(tasks=tasks)


def exits():
    def make_model():
        raise SystemExit(0)

    return problem(make_model=make_model)


def explosive_loss():
    return problem(loss=lambda output, target: mse_loss(output, target) * float("nan"))


def interrupted():
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 5:  # three steps an epoch: in the second one
            raise KeyboardInterrupt
        return mse_loss(output, target)

    return problem(loss=loss)


def no_seed():
    return problem(make_loaders=lambda: make_loaders(0))


def one_loader():
    return problem(make_loaders=lambda seed: make_loaders(seed)[0])


def no_model():
    return problem(make_model=lambda: "a model")


def empty():
    return problem(make_loaders=lambda seed: ([], []))


def not_a_problem():
    return 42
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny problem; a map, a branched model and runs made from it by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(PROBLEM)
    (folder / "plain_file").write_text("not a folder")
    before = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        for command in (
            "profile tiny.py:problem --epochs 8 --out map.json",
            "convert tiny.py:problem --map map.json --top-k 1 --out branched",
            "train tiny.py:problem --out joint",
            "train tiny.py:problem --model branched --method pcgrad --out recon1",
            "train tiny.py:problem --single-task --out single",
            "train tiny.py:another --epochs 1 --out another",
        ):
            assert main(command.split()) == 0, command
    finally:
        os.chdir(before[0])
        sys.path[:] = before[1]
    return folder


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """What importing a problem's file puts on the path is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def isolated(code):
    """Python code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_version_problems_and_usage_errors_come_without_torch():
    lines = [["--help"], ["--version"], ["problems"], ["problems", "--json"], ["trian"], ["train"], ["map", "show"]]
    lines += [[verb, "--help"] for verb in VERBS]
    lines += [["map", action, "--help"] for action in ("show", "compare", "merge", "import")]
    helps = [line for line in lines if "--help" in line]
    lines += [["profile", "digitz", "--out", "map.json"], ["train", "digits", "--epochs", "0", "--out", "run"]]
    lines += [["plan", "digits", "--backbone", "ResNet81", "--layers", "conv1"]]
    code = f"""
import sys
from recon_cli.main import main
for line in {helps}:
    main(line)
    heavy = {{"numpy", "scipy", "sklearn", "matplotlib", "networkx"}} & sys.modules.keys()
    assert not heavy, (line, heavy)
for line in {lines}:
    main(line)
    assert "torch" not in sys.modules, line
"""
    isolated(code)


def test_importing_recon_imports_no_torch():
    isolated("import sys, recon; assert 'torch' not in sys.modules; assert callable(recon.costs)")


def test_every_verb_file_is_registered():
    found = {file.stem for file in Path(verbs.__file__).parent.glob("*.py")}
    assert found == {"__init__", *VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_that_its_parser_takes(command, verb):
    code, out, _ = command(verb, "--help")
    assert code == 0
    examples = re.findall(r"^  (recon .*)$", out.partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        assert _parse(example.split()[1:]) is not None, example


def test_version(command):
    code, out, _ = command("--version")
    assert (code, out) == (0, "recon 0.1.0\n")


def test_exit_codes_reach_the_shell(files):
    def code(*line):
        return subprocess.run([sys.executable, "-m", "recon_cli", *line], cwd=files, capture_output=True).returncode

    assert code("problems") == 0
    assert code("map", "show", "plain_file") == 2


def test_profile_writes_a_map_that_says_how_it_was_made(files, command, ask, tmp_path):
    cmap = recon.ConflictMap.load(files / "map.json")
    assert cmap.tasks == ("up", "down")
    assert cmap.steps == 24
    assert {layer.name for layer in cmap.layers} == {"conv", "norm", "mix"}
    expected = {"problem": "tiny", "backbone": "Net", "seed": 0, "epochs": 8, "method": "joint", "optimizer": "Adam"}
    assert expected.items() <= cmap.made_by.items()
    assert {"recon", "python", "torch", "device", "seconds"} <= set(cmap.made_by)
    code, out, err = command("profile tiny.py:problem --epochs 1 --out", tmp_path / "new.json")
    assert code == 0
    assert f"Saved {tmp_path / 'new.json'}" in out
    assert f"recon convert tiny.py:problem --map {shlex.quote(str(tmp_path / 'new.json'))}" in out
    assert "epoch 1/1" in err and "epoch 1/1" not in out


def test_the_same_seed_profiles_to_the_same_scores(files, ask, tmp_path):
    def histograms(name):
        return [layer.histogram.tolist() for layer in recon.ConflictMap.load(tmp_path / name).layers]

    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        ask("profile tiny.py:problem --epochs 2 --seed", seed, "--out", tmp_path / name)
    assert histograms("a") == histograms("b")
    assert histograms("a") != histograms("c")


def test_profile_takes_a_learning_rate_and_a_threshold(ask, tmp_path):
    path = tmp_path / "map.json"
    ask("profile tiny.py:problem --epochs 1 --lr 0.25 --threshold -0.3 --method uw --out", path)
    cmap = recon.ConflictMap.load(path)
    assert cmap.made_by["learning_rate"] == 0.25
    assert cmap.made_by["method"] == "uw"
    assert cmap.threshold == -0.3


def test_convert_branches_the_top_of_the_ranking(files, ask, tmp_path):
    cmap = recon.ConflictMap.load(files / "map.json")
    for k in (1, 2):
        out = ask("convert tiny.py:problem --map map.json --top-k", k, "--out", tmp_path / str(k))
        assert set(out["branched_layers"]) == set(cmap.ranking()[:k])
        assert out["surgery"] == f"Recon K={k}"
    assert Run.load(tmp_path / "2").surgery == "Recon K=2"


def test_convert_says_what_it_costs(ask, tmp_path):
    out = ask("convert tiny.py:problem --layers mix --out", tmp_path / "branched")
    plain, branched = out["costs"]["plain"], out["costs"]["branched"]
    mix = 4 * 6 + 6
    assert branched["parameters"] - plain["parameters"] == mix
    assert plain["macs"] == 16 * 4 * 9 + 4 * 6 + 2 * 6  # per sample
    assert branched["macs"] - plain["macs"] == 4 * 6
    assert out["costs"]["ratio"]["macs"] == branched["macs"] / plain["macs"]
    assert branched["activation_bytes"] - plain["activation_bytes"] >= 6 * 4  # what mix gives, once more
    assert branched["seconds_per_step"] > 0
    assert out["statistics"] == []


def test_convert_lists_the_layers_whose_statistics_are_split(command, ask, tmp_path):
    assert ask("convert tiny.py:problem --layers conv --out", tmp_path / "a")["statistics"] == ["norm"]
    code, out, _ = command("convert tiny.py:problem --layers conv --out", tmp_path / "b")
    assert code == 0
    for words in ("conv", "norm", "parameters", "multiply-adds", "training step", "ratio", "recon train"):
        assert words in out


def test_the_random_control_depends_on_the_seed_alone(ask, tmp_path):
    def layers(seed, name):
        line = "convert tiny.py:problem --map map.json --top-k 1 --select random --seed"
        return ask(line, seed, "--out", tmp_path / name)["branched_layers"]

    assert layers(3, "a") == layers(3, "b")
    assert len({tuple(layers(seed, f"seed{seed}")) for seed in range(8)}) > 1
    assert Run.load(tmp_path / "a").surgery == "random K=1"


def test_a_converted_model_computes_what_the_fresh_model_does(files, ask, tmp_path):
    folder = tmp_path / "branched"
    ask("convert tiny.py:problem --layers conv mix --seed 4 --out", folder)
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    torch.manual_seed(4)
    fresh = problem.make_model().eval()
    branched = recon.load(folder, problem.make_model()).eval()
    inputs = torch.randn(3, 1, 4, 4)
    for task, output in fresh(inputs).items():
        torch.testing.assert_close(branched(inputs)[task], output)


def test_convert_verifies_unless_told_not_to(command, ask, tmp_path, monkeypatch):
    found = ask("convert tiny.py:problem --layers conv --out", tmp_path / "a")["verified"]
    assert found["modes"] == ["evaluation", "training"] and 0 <= found["gradients"] < found["tolerance"] == 1e-5
    code, out, _ = command("convert tiny.py:problem --layers conv --no-verify --out", tmp_path / "b")
    assert code == 0 and "Not verified, as --no-verify asks" in out
    monkeypatch.setattr("recon.branching.modules.branched.Branched.forward", lambda self, x: self.branch(("up",))(x))
    code, _, err = command("convert tiny.py:problem --layers conv --out", tmp_path / "c")
    assert code == 1 and "does not compute what it must" in err and not (tmp_path / "c" / "plan.json").exists()


DECIDES = PROBLEM.replace("x = self.mix(x).relu()", "x = self.mix(x).relu() if x.sum() > 0 else self.mix(x)")


def test_convert_names_the_way_out_and_takes_it(files, command, ask, tmp_path):
    (tmp_path / "decides.py").write_text(DECIDES)
    problem = f"{tmp_path / 'decides.py'}:problem"
    code, _, err = command(f"convert {problem} --layers conv --out", tmp_path / "fan")
    assert code == 2
    assert "Net.forward: `x = self.mix(x).relu() if x.sum() > 0" in err and "fan out at 'conv'" in err
    assert "--mode per-task" in err
    assert ask(f"convert {problem} --layers conv --mode per-task --out", tmp_path / "branched")["mode"] == "per-task"
    run = ask(f"train {problem} --model {tmp_path / 'branched'} --epochs 1 --out", tmp_path / "run")
    assert set(run["results"]) == {"up", "down"}


def test_convert_starts_from_the_weights_it_is_told_to(files, ask, tmp_path):
    def weights(name, *options):
        ask("convert tiny.py:problem --layers mix --out", tmp_path / name, *options)
        problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
        branched = recon.load(tmp_path / name, problem.make_model()).state_dict()
        return [branched[f"mix.branches.{task}.weight"] for task in ("up", "down")] + [branched["conv.weight"]]

    first, second, conv = weights("checkpoint", "--init", files / "joint")
    trained = recon.load(files / "joint", recon.problems.get(f"{files / 'tiny.py'}:problem").make_model()).state_dict()
    assert torch.equal(first, trained["mix.weight"]) and torch.equal(second, first)
    assert torch.equal(conv, trained["conv.weight"])
    first, second, _ = weights("scratch", "--init", "scratch")
    assert torch.equal(first, second) and not torch.equal(first, weights("copy")[0])
    first, second, conv = weights("independent", "--init", "scratch", "--copies", "independent")
    assert not torch.equal(first, second)
    assert torch.equal(conv, weights("again", "--init", "scratch", "--copies", "independent")[2])


def test_train_records_the_run(files):
    run = Run.load(files / "joint")
    assert (run.label, run.method, run.problem, run.tasks) == ("joint", "joint", "tiny", ("up", "down"))
    assert (run.epochs, run.seed, run.finished) == (2, 0, True)
    assert [epoch["number"] for epoch in run.history] == [1, 2]
    assert run.higher_is_better == {"up": {"error": False}, "down": {"error": False}}
    assert set(run.results) == {"up", "down"}
    assert run.parameters == 4 * 9 + 8 + 30 + 14
    assert run.macs == 16 * 4 * 9 + 4 * 6 + 2 * 6
    assert run.seconds_per_step > 0
    assert set(run.versions) == {"recon", "python", "torch"}


def test_train_trains_as_the_library_does(files, tmp_path):
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    torch.manual_seed(0)
    model = problem.make_model()
    recon.train(
        model,
        problem.make_loaders(0)[0],
        problem.losses,
        optimizer=problem.make_optimizer(model.parameters()),
        epochs=2,
    )
    saved = recon.load(files / "joint", problem.make_model())
    for ours, theirs in zip(saved.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_branched_run_says_how_its_layers_were_chosen(files):
    run, branched = Run.load(files / "recon1"), Run.load(files / "branched")
    assert run.label == "pcgrad + Recon K=1"
    assert run.branched_layers == branched.branched_layers
    assert (run.parameters, run.macs) == (branched.parameters, branched.macs)
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    model = recon.load(files / "recon1", problem.make_model())
    assert tuple(model.branch_plan.layers) == run.branched_layers
    assert recon.evaluate(model, problem.make_loaders(0)[1], problem.tasks) == run.results


def test_a_branched_model_saved_from_python_can_be_trained(files, ask, tmp_path):
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    plan = recon.BranchPlan.per_task(["mix"], problem.task_names)
    recon.save(recon.convert(problem.make_model(), plan, torch.randn(4, 1, 4, 4)), tmp_path / "model")
    run = ask("train tiny.py:problem --epochs 1 --model", tmp_path / "model", "--out", tmp_path / "run")
    assert run["label"] == "joint + K=1"
    assert run["branched_layers"] == ["mix"]


def test_single_task_runs_train_and_count_one_model_for_each_task(files):
    run, joint = Run.load(files / "single"), Run.load(files / "joint")
    assert run.label == run.method == "single-task"
    head_parameters, head_macs = 7, 6
    assert run.parameters == 2 * (joint.parameters - head_parameters)  # without the other task's head
    assert run.macs == 2 * (joint.macs - head_macs)
    assert [list(epoch["losses"]) for epoch in run.history] == [["up"], ["up"], ["down"], ["down"]]
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    for task in problem.tasks:
        model = recon.load(files / "single" / task.name, problem.make_model())
        results = recon.evaluate(model, problem.make_loaders(0)[1], [task])
        assert results[task.name] == run.results[task.name]


def test_a_single_task_run_replaces_the_model_of_an_older_run(ask, tmp_path):
    ask("train tiny.py:problem --epochs 1 --out", tmp_path / "run")
    ask("train tiny.py:problem --epochs 1 --single-task --out", tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["down", "run.json", "up"]


@pytest.mark.parametrize("name", ["joint", "recon1", "single"])
def test_evaluate_gives_the_results_of_the_training(files, ask, name):
    assert ask("evaluate tiny.py:problem --model", name)["results"] == Run.load(files / name).results


def test_evaluate_takes_one_model_of_a_single_task_run(ask, files):
    results = ask("evaluate tiny.py:problem --model single/up")["results"]
    assert results["up"] == Run.load(files / "single").results["up"]


def test_compare_finds_the_baseline_among_the_runs(files, ask, command):
    found = ask("compare joint recon1 single")
    given = ask("compare joint recon1 --baseline single")
    assert [row["delta_m"] for row in found["rows"][:2]] == [row["delta_m"] for row in given["rows"]]
    runs = {name: Run.load(files / name) for name in ("joint", "single")}
    expected = recon.delta_m(runs["joint"].results, runs["single"].results, runs["joint"].higher_is_better)
    assert found["rows"][0]["delta_m"] == expected
    code, out, err = command("compare joint recon1 single")
    assert code == 0 and not err
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["joint", "recon1", "single"]
    assert "pcgrad + Recon K=1" in out and "mean error" in out


def test_compare_without_a_baseline_says_how_to_get_one(command, ask):
    code, _, err = command("compare joint recon1")
    assert code == 0
    assert "note: Δm needs a single-task run" in err
    assert ask("compare joint recon1")["rows"][0]["delta_m"] is None


def test_map_show_ranks_the_layers(files, command, ask, tmp_path):
    cmap = recon.ConflictMap.load(files / "map.json")
    out = ask("map show map.json")
    assert [layer["name"] for layer in out["layers"]] == cmap.ranking()
    assert {layer["name"]: layer["score"] for layer in out["layers"]} == cmap.scores()
    assert [layer["name"] for layer in ask("map show map.json --top 2")["layers"]] == cmap.ranking()[:2]
    strict = ask("map show map.json --threshold -0.9")
    assert {layer["name"]: layer["score"] for layer in strict["layers"]} == cmap.scores(-0.9)
    code, text, _ = command("map show map.json --top 2 --threshold -0.9 --plot", tmp_path / "map.png")
    assert code == 0
    for words in ("tasks:     up, down", "steps:     24", "backbone Net", "... and 1 more", "at -0.1"):
        assert words in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_problems_and_methods(command, ask):
    assert {"name": "digits", **recon_problem("digits")} in ask("problems")["problems"]
    assert [method["name"] for method in ask("methods")["methods"]] == recon.methods.names()
    assert ask("methods cagrad")["paper"] == recon.methods.entry("cagrad").paper
    listed = " ".join(command("methods")[1].split())
    for entry in map(recon.methods.entry, recon.methods.names()):
        head = f"{entry.name}: {entry.title} ({entry.family})"
        assert f"{head} paper: {entry.paper} update: {entry.scale} options: {entry.describe_options()}" in listed
    for line in ("problems", "methods", "methods cagrad", "methods --markdown"):
        code, out, err = command(line)
        assert (code, err) == (0, "")
        assert "digits" in out or "cagrad" in out


def recon_problem(name):
    return {"description": recon.problems.descriptions()[name]}


def test_results_alone_are_on_stdout(command, ask, tmp_path):
    out = ask("train tiny.py:chatty --epochs 1 --out", tmp_path / "run")
    assert out["finished"]
    code, text, err = command("train tiny.py:chatty --epochs 1 --out", tmp_path / "run")
    assert code == 0
    assert "chatting" not in text and "chatting while training" in err


WRONG = {
    "mistyped verb": ("trian digits", "'train'"),
    "no verb": ("", "VERB"),
    "mistyped option": ("train tiny.py:problem --epoch 3 --out new", "did you mean '--epochs'"),
    "unknown problem": ("profile digit --out new.json", "'digits'"),
    "a file without that function": ("profile tiny.py:problm --out new.json", "'problem'"),
    "no such file": ("profile tyni.py:problem --out new.json", "'tiny.py'"),
    "not a problem": ("profile tiny.py:not_a_problem --out new.json", "must return a recon.Problem"),
    "unknown method": ("train tiny.py:problem --method cagrd --out new", "'cagrad'"),
    "unknown method in profile": ("profile tiny.py:problem --method cagrd --out new.json", "'cagrad'"),
    "method to describe": ("methods cagrd", "'cagrad'"),
    "malformed method options": ("train tiny.py:problem --method cagrad:c --out new", "name:option=value"),
    "unknown method option": ("train tiny.py:problem --method cagrad:d=1 --out new", "no option 'd'"),
    "wrong type of method option": ("train tiny.py:problem --method cagrad:c=x --out new", "type float"),
    "no epochs": ("train tiny.py:problem --epochs 0 --out new", "at least 1"),
    "no epochs of profiling": ("profile tiny.py:problem --epochs 0 --out new.json", "at least 1"),
    "learning rate": ("train tiny.py:problem --lr -1 --out new", "above 0"),
    "seed": ("train tiny.py:problem --seed x --out new", "whole number"),
    "threshold off the grid": ("profile tiny.py:problem --threshold -0.105 --out new.json", "multiple of 0.01"),
    "threshold of map show": ("map show map.json --threshold 0.5", "multiple of 0.01"),
    "threshold is no number": ("map show map.json --threshold low", "not a number"),
    "missing map": ("map show nope.json", "there is no such file"),
    "foreign map": ("map show joint/run.json", "not a conflict map"),
    "not JSON": ("map show plain_file", "not whole JSON"),
    "action of map": ("map shwo map.json", "show"),
    "missing map of convert": ("convert tiny.py:problem --map nope.json --top-k 1 --out new", "no such file"),
    "K too large": ("convert tiny.py:problem --map map.json --top-k 4 --out new", "between 1 and 3"),
    "K too small": ("convert tiny.py:problem --map map.json --top-k 0 --out new", "at least 1"),
    "no layers chosen": ("convert tiny.py:problem --map map.json --out new", "--top-k --share"),
    "K and a share": ("convert tiny.py:problem --map map.json --top-k 1 --share 0.5 --out new", "not allowed with"),
    "K without a map": ("convert tiny.py:problem --top-k 1 --out new", "--map"),
    "select with layers": ("convert tiny.py:problem --layers mix --select random --out new", "--select"),
    "independent copies of given weights": (
        "convert tiny.py:problem --layers mix --copies independent --out new",
        "--init",
    ),
    "no such checkpoint": ("convert tiny.py:problem --layers mix --init nope.pt --out new", "There is no file nope.pt"),
    "no checkpoint": (
        "convert tiny.py:problem --layers mix --init tiny.py --out new",
        "cannot be read as a state dict",
    ),
    "checkpoint after the surgery": (
        "convert tiny.py:problem --layers mix --init branched --out new",
        "branched model",
    ),
    "unknown mode": ("convert tiny.py:problem --layers mix --mode twice --out new", "per-task"),
    "unknown layer": ("convert tiny.py:problem --layers mxi --out new", "'mix'"),
    "a layer twice": ("convert tiny.py:problem --layers mix mix --out new", "twice"),
    "map of another model": ("convert digits --map map.json --top-k 1 --out new", "none of its 3 layers"),
    "no model": ("evaluate tiny.py:problem --model nope", "no model was saved"),
    "model of another problem": ("evaluate tiny.py:problem --model another", "the problem 'another'"),
    "train a model of another problem": ("train tiny.py:problem --model another --out new", "the problem 'another'"),
    "train a single-task run": ("train tiny.py:problem --model single --out new", "one model for each task"),
    "single tasks from a model": ("train tiny.py:problem --single-task --model joint --out new", "--model"),
    "single tasks by a method": ("train tiny.py:problem --single-task --method pcgrad --out new", "--method pcgrad"),
    "out below a file": ("train tiny.py:explodes --out plain_file/new", "plain_file is not a folder"),
    "out is a file": ("train tiny.py:explodes --out plain_file", "it is a file"),
    "out has other files": ("train tiny.py:explodes --out .", "holds other files"),
    "convert: out below a file": ("convert tiny.py:explodes --layers mix --out plain_file/new", "not a folder"),
    "profile: out below a file": ("profile tiny.py:explodes --out plain_file/map.json", "plain_file is not a folder"),
    "profile: out is a folder": ("profile tiny.py:explodes --out joint", "it is a folder"),
    "profile: out is another file": ("profile tiny.py:explodes --out tiny.py", "holds something else"),
    "plot below a file": ("map show map.json --plot plain_file/map.png", "plain_file is not a folder"),
    "plot over another file": ("map show map.json --plot map.json", "holds something else"),
    "runs of different problems": ("compare joint another", "same problem"),
    "unfinished run": ("compare joint branched", "recon train PROBLEM --model branched"),
    "not a run": ("compare joint plain_file", "holds no run.json"),
    "baseline is not a run": ("compare joint --baseline nope", "holds no run.json"),
    "loaders without a seed": ("train tiny.py:no_seed --out new", "the seed"),
    "one loader": ("train tiny.py:one_loader --out new", "(train loader, test loader)"),
    "not a model": ("train tiny.py:no_model --out new", "torch.nn.Module"),
    "an empty loader": ("train tiny.py:empty --out new", "no batch"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_a_message(refused, case):
    refused(*WRONG[case])


def test_a_truncated_map(files, command, tmp_path):
    path = tmp_path / "cut.json"
    path.write_text((files / "map.json").read_text()[:-30])
    for line in ("map show", "convert tiny.py:problem --top-k 1 --out new --map"):
        code, _, err = command(line, path)
        assert code == 2
        assert str(path) in err and "truncated" in err


def test_a_map_of_another_architecture(files, command, tmp_path):
    path = tmp_path / "other.json"
    path.write_text((files / "map.json").read_text().replace('"name": "', '"name": "backbone.'))
    code, _, err = command("convert tiny.py:problem --top-k 1 --out new --map", path)
    assert code == 2
    assert "another architecture" in err


def test_damaged_weights(files, command, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "weights.safetensors"):
        (folder / name).write_bytes((files / "joint" / name).read_bytes()[: None if name == "run.json" else 100])
    code, _, err = command("evaluate tiny.py:problem --model", folder)
    assert code == 2
    assert "damaged or truncated" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("line", ["profile tiny.py:problem --out new.json", "train tiny.py:problem --out new"])
def test_a_gpu_that_is_not_there(command, line):
    code, _, err = command(line, "--device", "cuda")
    assert code == 2
    assert "--device cpu" in err


USER_ERRORS = {
    "bad_model": ("ValueError: forward went wrong", "forward"),
    "bad_loader": ("RuntimeError: disk is gone", "batches"),
    "explodes": ("AssertionError: the model was made", "make_model"),
    "exits": ("SystemExit: 0", "make_model"),
}


@pytest.mark.parametrize("function", USER_ERRORS)
def test_an_error_in_the_problem_s_code_names_its_line(files, command, tmp_path, function):
    what, where = USER_ERRORS[function]
    code, out, err = command(f"train tiny.py:{function} --out", tmp_path / "run")
    assert (code, out) == (1, "")
    assert what in err and "Your code" in err and "Traceback" not in err
    line = int(re.search(rf"{re.escape(str(files / 'tiny.py'))}:(\d+), in {where}\b", err)[1])
    assert re.search(r"raise \w+", PROBLEM.splitlines()[line - 1])
    code, out, err = command(f"train tiny.py:{function} --debug --json --out", tmp_path / "again")
    assert what in json.loads(out)["error"]["message"]
    assert "Traceback" in err


def test_a_metric_that_fails_leaves_the_trained_model(files, command, tmp_path):
    code, _, err = command("train tiny.py:bad_metric --out", tmp_path / "run")
    assert code == 1
    assert "no metric today" in err and f"{tmp_path / 'run'} holds the model after epoch 1 of 2" in err
    assert not Run.load(tmp_path / "run").finished


def test_a_loss_that_is_not_finite_fails_while_running(command, tmp_path):
    for line in ("train tiny.py:explosive_loss --out", "profile tiny.py:explosive_loss --out"):
        code, out, _ = command(line, tmp_path / "new", "--json")
        assert code == 1
        assert json.loads(out)["error"]["type"] == "GradientError"
        assert not (tmp_path / "new").exists()


def test_an_error_of_our_own_asks_for_the_traceback(command, monkeypatch):
    monkeypatch.setattr("recon_cli.verbs.problems.descriptions", partial(int, "a bug"))
    code, out, err = command("problems")
    assert (code, out) == (1, "")
    assert "ValueError: invalid literal" in err and "not expected" in err and "--debug" in err


def test_an_interrupted_training_leaves_its_last_epoch(files, command, ask, tmp_path):
    folder = tmp_path / "run"
    code, out, _ = command("train tiny.py:interrupted --json --out", folder)
    assert code == 1
    assert f"{folder} holds the model after epoch 1 of 2" in json.loads(out)["error"]["message"]
    run = Run.load(folder)
    assert not run.finished and len(run.history) == 1
    assert set(ask("evaluate tiny.py:problem --model", folder)["results"]) == {"up", "down"}
    code, _, err = command("compare", folder)
    assert code == 2
    assert f"recon train PROBLEM --out {folder} --resume" in err
    assert ask("train tiny.py:problem --resume --out", folder)["finished"]


def test_control_c_leaves_a_checkpoint(files, tmp_path):
    line = [sys.executable, "-m", "recon_cli", "train", "tiny.py:problem", "--epochs", "1000000", "--out"]
    process = subprocess.Popen([*line, str(tmp_path / "run")], cwd=files, stderr=subprocess.PIPE, text=True)
    try:
        seen = next(text for text in process.stderr if text.startswith("epoch 2/"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1, seen
    message, way_on = err.splitlines()[-2:]
    last = re.match(r"error: Interrupted\. .* holds the model after epoch (\d+) of 1000000\. .* Go on with:", message)
    assert way_on.startswith("  recon train tiny.py:problem --epochs 1000000 --out") and way_on.endswith("--resume")
    run = Run.load(tmp_path / "run")
    assert len(run.history) == int(last[1]) and not run.finished
    problem = recon.problems.get(f"{files / 'tiny.py'}:problem")
    recon.load(tmp_path / "run", problem.make_model())


def test_a_reader_that_stops_early_is_no_error(files):
    line = '"$0" -m recon_cli map show map.json | true; exit ${PIPESTATUS[0]}'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=files, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_example_inputs_are_cut_only_where_every_tensor_has_the_batch_first():
    images, masks = torch.zeros(32, 3), torch.zeros(32, 5, 5)
    (few, [fewer]), samples = few_samples((images, [masks]))
    assert (len(few), len(fewer), samples) == (8, 8, 8)
    graph = {"nodes": torch.zeros(30, 4), "edges": torch.zeros(2, 90)}
    assert few_samples(graph) == (graph, 30)
    tagged = (torch.zeros(32, 3), "a name")
    assert few_samples(tagged) == (tagged, 32)
    assert few_samples(torch.zeros(4, 3))[1] == 4


def test_a_module_by_its_name(ask, tmp_path):
    assert ask("train tiny:problem --epochs 1 --out", tmp_path / "run")["problem"] == "tiny"


def test_digits_can_be_converted_and_evaluated(ask, tmp_path):
    out = ask("convert digits --layers blocks.2.conv1 --out", tmp_path / "late")
    assert out["costs"]["ratio"]["macs"] > 1
    results = ask("evaluate digits --model", tmp_path / "late")["results"]
    assert all(0 <= metrics["accuracy"] < 0.5 for metrics in results.values())  # it was never trained


@pytest.mark.slow
def test_recon_on_digits_from_the_map_to_the_table(ask, tmp_path):
    ask("profile digits --epochs 1 --out", tmp_path / "map.json")
    ask("convert digits --top-k 4 --map", tmp_path / "map.json", "--out", tmp_path / "branched")
    ask("train digits --epochs 1 --model", tmp_path / "branched", "--out", tmp_path / "recon")
    ask("train digits --epochs 1 --out", tmp_path / "joint")
    ask("train digits --epochs 1 --single-task --out", tmp_path / "single")
    table = ask("compare", tmp_path / "joint", tmp_path / "recon", "--baseline", tmp_path / "single")
    assert all(row["mean"] > 0.9 and abs(row["delta_m"]) < 10 for row in table["rows"])
    assert table["rows"][1]["parameters_ratio"] > 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files, root or not")
@pytest.mark.parametrize("verb", ["profile", "train"])
def test_a_folder_that_takes_no_files_is_refused_before_the_training(verb, command):
    code, _, err = command(f"{verb} digits --out /proc/nowhere/out")
    assert code == 2 and "No file can be made in" in err and "epoch" not in err
