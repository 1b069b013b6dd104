"""The benchmark against a linear baseline, on few rows."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from recon.problems import get
from tests.problems.test_adult import people, write
from tests.problems.test_tox21 import molecules
from tests.problems.test_tox21 import write as write_tox21

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "linear_baselines.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("linear_baselines", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_both_for_every_task_and_their_mean(bench, tmp_path, capsys, monkeypatch):
    write(tmp_path / "adult", people(300, 0), people(100, 1))
    monkeypatch.setattr(bench, "STRENGTHS", (0.1, 1.0))
    monkeypatch.setattr("sys.argv", ["linear_baselines.py", "adult", "--data-root", str(tmp_path), "--seeds", "2"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert "adult, 2 seeds" in lines[0]
    assert [line.split()[0] for line in lines[1:9]] == [
        *("auc", "income", "marital_status", "mean"),
        *("accuracy", "income", "marital_status", "mean"),
    ]
    assert all(line.count("±") == 2 for line in lines if line.startswith(("income", "marital", "mean")))


def test_the_baseline_sees_the_labelled_samples_of_our_inputs(bench, tmp_path):
    problem = get("tox21", data_root=write_tox21(tmp_path, molecules(250)))
    train, test = (bench.arrays(loader, problem.task_names) for loader in bench.whole(problem))
    loaders = problem.make_loaders(0)
    assert [len(inputs) for inputs, _ in (train, test)] == [len(loader.dataset) for loader in loaders]
    x, y = bench._labelled(train, "NR-ER")
    known = ~loaders[0].dataset.targets["NR-ER"].isnan().numpy()
    np.testing.assert_array_equal(np.rint(np.exp(x) - 1), loaders[0].dataset.inputs.numpy()[known])
    np.testing.assert_array_equal(y, loaders[0].dataset.targets["NR-ER"].numpy()[known])


class Guess:
    """Ranks rows by the first column if its penalty is strong, the other way round if it is weak."""

    def __init__(self, strength):
        self.sign = 1 if strength < 1 else -1

    def decision_function(self, x):
        return self.sign * x[:, 0]

    def score(self, x, y):
        return ((self.decision_function(x) > 0) == y).mean()


def test_the_penalty_is_the_best_on_a_part_of_the_training_data(bench, monkeypatch):
    fitted = []
    monkeypatch.setattr(bench, "STRENGTHS", (10.0, 0.1))
    monkeypatch.setattr(bench, "_fit", lambda x, y, strength: fitted.append((len(x), strength)) or Guess(strength))
    x = np.random.RandomState(0).randn(300, 2)
    y = (x[:, 0] > 0).astype(float)
    scores = bench._linear(x, y, x[:50], 1 - y[:50], seed=0)  # the test data say the contrary
    assert fitted == [(240, 10.0), (240, 0.1), (300, 0.1)]
    assert scores == {"auc": 0, "accuracy": 0}


def test_a_fit_is_scikit_learns_with_that_penalty(bench):
    random = np.random.RandomState(0)
    x, y = random.randn(200, 3), random.randint(2, size=200)
    model = bench._fit(x, y, 0.3)
    p = 1 / (1 + np.exp(-model.decision_function(x)))
    # Where C times the sum of the losses and half the squared weights are least, this vanishes; the bias is free.
    np.testing.assert_allclose(0.3 * x.T @ (p - y) + model.coef_[0], 0, atol=1e-2)
    assert abs((p - y).sum()) < 1e-2
