"""The toys of the papers: what the examples claim, checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    matplotlib.use("Agg")
    spec = importlib.util.spec_from_file_location("cagrad_toy", EXAMPLES / "cagrad_toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The objectives as the paper's appendix writes them: sums of two parts, each faded out in the other half."""
    upper, lower = (x2 / 2).tanh().clamp(min=0), (-x2 / 2).tanh().clamp(min=0)
    f1 = (0.5 * (-x1 - 7) - (-x2).tanh()).abs().clamp(min=0.000005).log() + 6
    f2 = (0.5 * (-x1 + 3) + (-x2).tanh() + 2).abs().clamp(min=0.000005).log() + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return upper * f1 + lower * g1, upper * f2 + lower * g2


def random_points(count: int) -> Tensor:
    return 22 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 11


def test_the_objectives_are_those_of_the_paper(toy):
    points = random_points(500)
    torch.testing.assert_close(toy.objectives(points), published(*points.unbind(-1)))


def test_gradients_are_right_on_both_sides_of_the_fold(toy):
    points = random_points(40).requires_grad_()
    assert torch.autograd.gradcheck(toy.objectives, points, eps=1e-7, atol=1e-5)


def test_the_marked_minimum_and_pareto_set_are_right(toy):
    side = torch.linspace(-11, 11, 441, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    first, second = toy.objectives(grid)
    values = toy.objectives(toy.BEST)
    assert (first + second).min() >= sum(values)
    assert (grid[(first + second).argmin()] - toy.BEST).abs().max() < 0.05
    for end, objective in ((toy.PARETO[0], second), (toy.PARETO[-1], first)):
        assert (grid[objective.argmin()] - end).abs().max() < 0.05
    for one, other in zip(*toy.objectives(toy.PARETO[::50]), strict=True):  # nothing on the grid is better in both
        assert not ((first < one) & (second < other)).any()


def test_cagrad_ends_at_the_minimum_of_the_mean_where_mgda_does_not(toy):
    # Two of the five starts, those that get there in few steps; in the example it is all five.
    starts = torch.tensor([toy.STARTS[1], toy.STARTS[4]], dtype=torch.float64)
    cagrad, mgda = toy.descend(["cagrad:c=0.5", "mgda"], starts, steps=1500, lr=0.05)[-1]
    assert [toy.verdict(end) for end in cagrad] == ["minimum of the mean"] * 2
    assert [toy.verdict(end) for end in mgda] == ["on the Pareto set only"] * 2
