import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import recon.problems.sets.digits as digits_module
from recon.errors import ProblemError, ReconError, UnknownNameError, UsageError
from recon.problems import descriptions, get, names
from recon.problems.loading import TensorBatches, in_order, shuffled
from recon.problems.problem import Metric, Problem, Task
from recon.training.evaluation import directions, evaluate
from recon_cli.main import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_problem.py"

OWN = """
import torch
from recon.problems.problem import Problem, Task

def problem():
    tasks = [Task(name, torch.nn.functional.mse_loss) for name in ("a", "b")]
    return Problem("own", tasks, make_model, make_loaders=lambda seed: ([], []))

def make_model():
    import neighbour
    return neighbour.Net()
"""
NEIGHBOUR = "import torch\nclass Net(torch.nn.Identity):\n    origin = '{}'\n"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch, tmp_path):
    """Whatever a test imports from its own files is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def train(problem, steps):
    model, (loader, test) = problem.make_model(), problem.make_loaders(0)
    optimizer = problem.make_optimizer(model.parameters())
    for inputs, targets in islice(loader, steps):
        outputs = model(inputs)
        loss = sum(loss(outputs[task], targets[task]) for task, loss in problem.losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(model, test, problem.tasks)


# The digits.


def test_digits_come_as_normalised_batches():
    train_batches, test_batches = map(list, get("digits").make_loaders(0))
    assert len(train_batches) == 20_000 // 128
    assert sum(len(inputs) for inputs, _ in test_batches) == 4_000
    inputs = torch.cat([inputs for inputs, _ in train_batches])
    assert inputs.shape[1:] == (1, 12, 12) and inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02
    for task in ("top_left", "bottom_right"):
        labels = torch.cat([targets[task] for _, targets in test_batches])
        assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))


def test_no_digit_is_trained_and_tested_on(monkeypatch):
    seen = []
    overlay = digits_module._overlay

    def spy(images, *args, **kwargs):
        seen.append({image.tobytes() for image in images})
        return overlay(images, *args, **kwargs)

    monkeypatch.setattr(digits_module, "_overlay", spy)
    digits_module._data()
    trained, tested = seen
    assert len(trained) + len(tested) == 1797 and not trained & tested


def test_overlaid_digits_keep_their_corner_and_label_and_saturate():
    images = np.stack([np.full((8, 8), value) for value in (3.0, 10.0)])
    canvases, targets = digits_module._overlay(images, np.array([3, 10]), pairs=50, seed=0)
    pairs = set()
    for canvas, first, second in zip(canvases[:, 0], targets["top_left"], targets["bottom_right"], strict=True):
        assert (canvas[:4, :8] == first).all() and (canvas[8:, 4:] == second).all()
        assert (canvas[4:8, 4:8] == min(first + second, 16)).all()
        assert (canvas[:4, 8:] == 0).all() and (canvas[8:, :4] == 0).all()
        pairs.add((int(first), int(second)))
    assert pairs == {(3, 3), (3, 10), (10, 3), (10, 10)}


def test_the_seed_only_shuffles_the_digits():
    (train_a, test_a), (train_b, test_b) = (get("digits").make_loaders(seed) for seed in (0, 1))
    assert torch.equal(train_a.dataset.inputs, train_b.dataset.inputs)
    assert torch.equal(test_a.dataset.inputs, test_b.dataset.inputs)
    assert not torch.equal(next(iter(train_a))[0], next(iter(train_b))[0])


def test_digits_are_learned():
    torch.manual_seed(0)
    results = train(get("digits"), steps=40)
    assert min(metrics["accuracy"] for metrics in results.values()) > 0.5  # chance is 0.1


# Loading.


def numbers(loader):
    return [inputs.tolist() for inputs, _ in loader]


def test_shuffled_batches_differ_between_passes_and_replay_with_their_seed():
    data = TensorBatches(torch.arange(10), {"double": 2 * torch.arange(10)})
    loader, replay, other = shuffled(data, 3, seed=5), shuffled(data, 3, seed=5), shuffled(data, 3, seed=6)
    passes = [numbers(loader) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    assert [numbers(replay) for _ in range(3)] == passes
    assert numbers(other) != passes[0]
    assert [len(batch) for batch in passes[0]] == [3, 3, 3]
    assert all(torch.equal(targets["double"], 2 * inputs) for inputs, targets in loader)


def test_the_generators_state_resumes_the_passes():
    data = TensorBatches(torch.arange(10), {})
    loader, resumed = shuffled(data, 2, seed=0), shuffled(data, 2, seed=1)
    numbers(loader)
    resumed.generator.set_state(loader.generator.get_state())
    assert numbers(resumed) == numbers(loader)


def test_inputs_are_transformed_as_they_are_read():
    data = TensorBatches(torch.tensor([0, 51, 255], dtype=torch.uint8), {}, transform=lambda grey: grey / 255)
    assert numbers(in_order(data, 2)) == [pytest.approx([0, 0.2]), [1]] and data.inputs.dtype == torch.uint8


def test_in_order_gives_every_sample_once():
    assert numbers(in_order(TensorBatches(torch.arange(5), {}), 2)) == [[0, 1], [2, 3], [4]]


def test_loading_leaves_the_global_random_numbers_alone():
    data = TensorBatches(torch.arange(10), {})
    before = torch.get_rng_state()
    numbers(shuffled(data, 2, seed=0)), numbers(in_order(data, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_targets_must_match_the_inputs():
    with pytest.raises(ProblemError, match="'a' has 4 targets for 5 inputs"):
        TensorBatches(torch.zeros(5), {"a": torch.zeros(4)})


# Problems by name.


def test_built_in_problems_are_what_the_list_says():
    assert names() == list(descriptions())
    assert get("digits").name == "digits" and get("digits").description == descriptions()["digits"]


def test_listing_problems_does_not_import_torch():
    folder = Path(digits_module.__file__).parents[2]
    code = f"""
import sys, types
sys.modules["recon"] = types.ModuleType("recon")  # whatever the package itself imports is not at issue here
sys.modules["recon"].__path__ = [{str(folder)!r}]
import recon.problems
assert "digits" in recon.problems.descriptions()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_is_a_problem_that_learns_both_of_its_tasks():
    problem = get(f"{EXAMPLE}:problem")
    torch.manual_seed(0)
    untrained, trained = train(problem, steps=0), train(problem, steps=22)
    assert trained["digit"]["accuracy"] > untrained["digit"]["accuracy"] + 0.3
    assert trained["slant"]["mean absolute error"] < untrained["slant"]["mean absolute error"]
    assert directions(problem.tasks)["slant"] == {"mean absolute error": False}


def test_a_file_imports_its_neighbours_even_late(write):
    path = write("own.py", OWN)
    write("neighbour.py", NEIGHBOUR.format("here"))
    for _ in range(2):
        problem = get(f"{path}:problem")
        assert problem.make_model().origin == "here"


def test_each_file_gets_its_own_neighbours(write):
    for folder in ("one", "two"):
        path = write(f"{folder}/own.py", OWN)
        write(f"{folder}/neighbour.py", NEIGHBOUR.format(folder))
        assert get(f"{path}:problem").make_model().origin == folder


def test_what_a_file_defines_can_be_pickled(write):
    path = write("pickled.py", OWN + "\nclass Data: pass\n")
    make_model = get(f"{path}:problem").make_model
    assert make_model.__module__ == "pickled" and pickle.loads(pickle.dumps(make_model)) is make_model


def test_a_file_named_like_a_library_does_not_replace_it(write):
    write("neighbour.py", NEIGHBOUR.format("here"))
    path = write("torch.py", OWN)
    assert get(f"{path}:problem").make_model().origin == "here"
    assert sys.modules["torch"] is torch


def test_a_module_of_the_current_folder(write, monkeypatch):
    monkeypatch.chdir(write("package/own_module.py", OWN).parents[1])
    assert get("package.own_module:problem").name == "own"


def test_a_problem_itself_is_as_good_as_a_function(write):
    assert get(f"{write('own.py', OWN + 'made = problem()')}:made").name == "own"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("digit", UnknownNameError, "no problem named 'digit'. Did you mean 'digits'"),
        ("own.py", UnknownNameError, "path/to/file.py:function"),
        ("own.py:", UsageError, "does not end in ':function'"),
        (":problem", UsageError, "does not end in ':function'"),
        ("onw.py:problem", UnknownNameError, "no Python file named 'onw.py'. Did you mean 'own.py'"),
        ("nowhere/own.py:problem", UnknownNameError, "no Python file named 'nowhere/own.py'"),
        ("own.py:problme", UnknownNameError, "no function named 'problme'. Did you mean 'problem'"),
        ("onw:problem", UnknownNameError, "no module named 'onw'. Did you mean 'own'"),
        ("no.such.module:problem", UnknownNameError, "no module named 'no.such.module'"),
    ],
)
def test_a_wrong_name_says_what_to_try(spec, error, message, write, monkeypatch):
    monkeypatch.chdir(write("own.py", OWN).parent)
    with pytest.raises(error) as caught:
        get(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "cause", "line"),
    [
        ("import torch\n1 / 0\n", ZeroDivisionError, 2),
        ("import torch\n\ntorch.nn.Linear(2)\n", TypeError, 3),
        ("def problem(:\n", SyntaxError, 1),
        ("import nothing_like_this\n", ModuleNotFoundError, 1),
        ("raise SystemExit(3)\n", SystemExit, 1),
        ("def problem():\n    raise RuntimeError('no data')\n", RuntimeError, 2),
    ],
)
@pytest.mark.parametrize("form", ["{}.py:problem", "{}:problem"])
def test_an_exception_in_the_users_code_names_its_line(text, cause, line, form, write, monkeypatch):
    path = write(f"broken_{cause.__name__}.py", text)
    monkeypatch.chdir(path.parent)
    with pytest.raises(ProblemError) as caught:
        get(form.format(path.stem))
    assert f"raised {cause.__name__}" in str(caught.value) and f"({path}, line {line})" in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_recons_own_errors_pass_through_the_users_code(write):
    path = write("own.py", OWN.replace('("a", "b")', '("a", "a")'))
    with pytest.raises(ProblemError, match=r"^Problem 'own' needs at least two tasks"):
        get(f"{path}:problem")


def test_a_function_must_return_a_problem(write):
    path = write("own.py", "def problem():\n    pass\n")
    with pytest.raises(ProblemError, match=r"must return a recon\.Problem, but it returned NoneType"):
        get(f"{path}:problem")


# Options of problems.


def test_a_function_gets_the_options_that_were_given(write):
    returned = "Problem(repr((data_root, train_samples)), problem().tasks, make_model, lambda seed: ([], []))"
    path = write("own.py", f"{OWN}\ndef options(data_root, *, train_samples=None):\n    return {returned}\n")
    assert get(f"{path}:options", data_root="here", train_samples=None).name == "('here', None)"
    assert get(f"{path}:options", data_root="here", train_samples=5).name == "('here', 5)"
    assert get(f"{path}:problem", data_root=None, train_samples=None).name == "own"


def test_a_function_of_any_options(write):
    path = write(
        "own.py", f"{OWN}\ndef lenient(*args, **options):\n    assert options == {{'size': 3}}\n    return problem()"
    )
    assert get(f"{path}:lenient", size=3).name == "own"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "problem",
            {"data_root": "here"},
            r"problem does not accept data_root \(--data-root DIR\)\. It accepts no options",
        ),
        (
            "reads",
            {"data_root": "here", "sise": 3},
            r"does not accept sise\. It accepts data_root \(--data-root DIR\), size",
        ),
        ("reads", {}, r"reads needs data_root \(--data-root DIR\)"),
        ("made", {"train_samples": 3}, r"made does not accept train_samples \(--train-samples N\)"),
        (
            "digits",
            {"data_root": "here"},
            r"digits does not accept data_root .* It accepts train_samples \(--train-samples N\)",
        ),
        ("digits", {"train_samples": 3}, r"batches of 128 samples, so 3 .* too few\. Ask for at least 128"),
        ("digits", {"train_samples": 20_001}, r"digits has 20000 training samples, not 20001\. Ask for fewer"),
    ],
)
def test_options_that_do_not_fit_the_function(name, options, message, write):
    path = write("own.py", f"{OWN}\ndef reads(data_root, size=1): return problem()\n\nmade = problem()\n")
    with pytest.raises(UsageError, match=message):
        get(name if name == "digits" else f"{path}:{name}", **options)


READS = """
import torch
from pathlib import Path
from recon.problems.problem import Problem, Task

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = torch.nn.Linear(3, 2)
        self.a, self.b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"a": self.a(self.shared(x)), "b": self.b(self.shared(x))}

def problem(data_root, train_samples=8):
    inputs = torch.load(Path(data_root) / "inputs.pt")[:train_samples]
    batches = [(inputs, {"a": inputs[:, :1], "b": inputs[:, 1:2]})]
    tasks = [Task(name, torch.nn.functional.mse_loss) for name in ("a", "b")]
    return Problem("reads", tasks, Net, lambda seed: (batches, batches))
"""


def test_the_verbs_pass_the_options_on(write, tmp_path, monkeypatch, capsys):
    def command(*words):
        code = main([*words, "--device", "cpu"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    write("reads.py", READS)
    write("my data/inputs.pt", "")
    torch.save(torch.randn(8, 3), tmp_path / "my data" / "inputs.pt")
    monkeypatch.chdir(tmp_path)
    problem = ["reads.py:problem", "--data-root", "my data", "--train-samples", "4"]
    as_typed = "reads.py:problem --data-root 'my data' --train-samples 4"
    assert f"recon convert {as_typed} --map map.json" in command("profile", *problem, "--out", "map.json")
    assert f"recon train {as_typed} --model out" in command("convert", *problem, "--layers", "shared", "--out", "out")
    command("train", *problem, "--model", "out", "--epochs", "1", "--out", "run")
    command("evaluate", *problem, "--model", "run")


# Tasks.


@pytest.mark.parametrize("name", ["", "a.b", "a+b"])
def test_task_names_must_fit_into_parameter_names(name):
    with pytest.raises(ReconError, match="cannot be used"):
        Task(name, torch.nn.functional.mse_loss)


def test_metrics_of_a_task_have_different_names():
    with pytest.raises(ProblemError, match=r"\['error', 'error'\]"):
        Task("a", torch.nn.functional.mse_loss, [Metric("error", object)] * 2)


def test_what_is_no_loss_and_no_task_is_named():
    with pytest.raises(ProblemError, match=r"loss of task 'a' is 'mse', which cannot be called"):
        Task("a", "mse")
    with pytest.raises(ProblemError, match=r"hold 'b'\. Each must be a recon\.Task"):
        Problem("p", [Task("a", torch.nn.functional.mse_loss), "b"], torch.nn.Identity, lambda seed: ([], []))


@pytest.mark.parametrize("tasks", [[], ["a"], ["a", "a"]])
def test_a_problem_needs_two_different_tasks(tasks):
    made = [Task(name, torch.nn.functional.mse_loss) for name in tasks]
    with pytest.raises(ProblemError, match="at least two tasks"):
        Problem("p", made, torch.nn.Identity, lambda seed: ([], []))
