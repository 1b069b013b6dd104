"""Methods of a user's own: functions and classes, registered or named by their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recon
from recon import methods
from recon.errors import ProblemError, UnknownNameError, UsageError
from recon.support.importing import import_target
from tests.methods.test_methods import scratch_registry
from tests.methods.test_step import gradients_by_task, losses_of, model, shared_rows, x

fixtures = (model, x, scratch_registry)
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
OWN = """
import torch
from recon.methods import GramianAggregator


def longest(J, factor=1.0, label="x"):
    return factor * J[J.norm(dim=1).argmax()]


def by_norm(gramian):
    return gramian.diagonal().rsqrt()


def halves(losses):
    '''Half of every loss.'''
    return 0 * losses + 0.5


def flat(J):
    return J


def nothing(losses):
    return None


class First(GramianAggregator):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def weights(self, gramian, tasks=None):
        return self.factor * torch.eye(len(gramian)).to(gramian)[0]


number = 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def stem_of(model):
    return torch.cat([p.grad.flatten() for p in [*model.conv.parameters(), *model.norm.parameters()]])


def test_functions_and_classes_of_a_file(model, x, own):
    gradients = gradients_by_task(model, x)
    rows = shared_rows(model, gradients)
    longest = rows[rows.norm(dim=1).argmax()]
    expected = {
        "longest:factor=2,label=7": 2 * longest,
        "by_norm": (rows / rows.norm(dim=1, keepdim=True)).sum(0),
        "halves": rows.sum(0) / 2,
        "First:factor=3": 3 * rows[0],
    }
    for text, update in expected.items():
        model.zero_grad()
        method = methods.parse(f"{own}:{text}")
        assert method.name == text.partition(":")[0]
        recon.backward(losses_of(model, x), model, method)
        torch.testing.assert_close(stem_of(model), update, rtol=1e-9, atol=1e-9)
    assert methods.parse(f"{own}:longest:label=7").settings() == {"factor": 1.0, "label": "7"}
    assert methods.parse(f"uw+{own}:longest").name == "uw+longest"
    model.zero_grad()
    recon.backward(losses_of(model, x), model, methods.parse(f"{own}:halves+{own}:by_norm"))
    torch.testing.assert_close(stem_of(model), expected["by_norm"], rtol=1e-9, atol=1e-9)


def test_a_module_on_the_path(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    (own.parent / "package").mkdir()
    (own.parent / "package" / "mine.py").write_text(OWN)
    assert methods.parse("package.mine:longest:factor=2").settings()["factor"] == 2.0


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{own}:longets", UnknownNameError, "no function or class named 'longets'. Did you mean 'longest'"),
        ("{own}x.py:longest", UnknownNameError, "Python file"),
        ("nowhere:longest", UnknownNameError, "no module named 'nowhere'"),
        ("{own}:longest:fctor=2", UsageError, "no option 'fctor'. Its options: factor=1.0, label=x"),
        ("{own}:number", UsageError, "but a int is none of these"),
        ("{own}:torch", UsageError, "but a module is none of these"),
        ("{own}:longest:factor", UsageError, "Cannot read 'factor'"),
    ],
)
def test_what_is_not_there_is_named(own, text, error, said):
    with pytest.raises(error, match=said):
        methods.parse(text.format(own=own))


def test_a_file_that_raises(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ProblemError, match="ZeroDivisionError"):
        methods.parse(f"{tmp_path / 'broken.py'}:longest")


@pytest.mark.parametrize(
    ("name", "said"), [("flat", r"must return a tensor of shape \(\d+,\), but returned one"), ("nothing", "None")]
)
def test_a_function_that_returns_something_else(model, x, own, name, said):
    with pytest.raises(UsageError, match=said):
        recon.backward(losses_of(model, x), model, methods.parse(f"{own}:{name}"))


def test_a_registered_function(scratch_registry):
    for factor in (2.0, 3.0):  # a notebook's cell, run again

        @methods.register("scaled", paper="none", scale="Scaled.")
        def scaled(J, factor=factor):
            """Scaled sum.

            More.
            """
            return factor * J.sum(0)

    entry = methods.entry("scaled")
    assert (entry.family, entry.title, entry.options) == ("aggregator", "Scaled sum.", {"factor": 3.0})
    J = torch.randn(2, 3)
    torch.testing.assert_close(methods.get("scaled", factor=5)(J), 5 * J.sum(0))
    torch.testing.assert_close(scaled(J, 2.0), 2 * J.sum(0))  # still a function
    with pytest.raises(UsageError, match="already a method named 'scaled'"):

        @methods.register("scaled")
        def other(J): ...

    with pytest.raises(UsageError, match="'factor' has none"):

        @methods.register("new")
        def needs(J, factor): ...


def test_a_registered_weighting_keeps_to_the_present_tasks(scratch_registry):
    @methods.register("shares")
    def shares(losses):
        return len(losses) * losses / losses.sum()

    method = methods.get("shares")
    method.setup(("a", "b", "c"))
    total, weights = method.combine({"a": torch.tensor(1.0), "c": torch.tensor(3.0)})
    assert {t: w.item() for t, w in weights.items()} == {"a": 0.5, "c": 1.5}
    assert total.item() == 5
    assert method.weights(3).tolist() == [0.5, 1, 1.5]


def test_the_example_runs(scratch_registry, capsys):
    import_target(str(EXAMPLE)).main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("top_left" in line for line in lines)
    assert "clipped-sum" in methods.names()


def test_a_function_is_named_or_registered():
    def mine(J):
        return J.sum(dim=0)

    with pytest.raises(UsageError, match=r"method is the function mine\. Register it"):
        methods.wrap(mine)


def test_numbers_that_are_not_finite_are_the_functions_own_fault(scratch_registry):
    @methods.register("bad-one")
    def bad_one(J):
        return J.sum(dim=0) * float("nan")

    with pytest.raises(UsageError, match="'bad-one' returned numbers that are not finite"):
        methods.get("bad-one")(torch.ones(2, 3))
