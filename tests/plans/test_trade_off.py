"""The frontier on real networks; what is best is found again by brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon.errors import PlanError
from recon.models import SmallResNet
from recon.plans.costing.cost_model import CostModel
from recon.plans.matching import match
from recon.plans.pictures.trade_off_picture import draw_frontier, frontier_figure
from recon.plans.planning import choose
from recon.plans.selection import Selection
from recon.plans.trade_off import frontier, frontier_table
from tests.maps.test_conflict_map import make_map

TASKS = ("a", "b", "c")
SHARED = ("stem.conv", "blocks.0.conv1", "blocks.1.conv2", "blocks.2.bn1", "blocks.2.conv2")


@pytest.fixture(scope="module")
def setting():
    """A match, its model and the model's costs."""
    torch.manual_seed(0)
    model = SmallResNet(dict.fromkeys(TASKS, 4))
    found = match(make_map(layers=SHARED, tasks=TASKS), model)
    return found, model, CostModel(model, TASKS, torch.randn(2, 1, 12, 12))


def by_selector(points):
    return {point.selector: point for point in points}


def test_every_k_is_a_point(setting):
    found, model, costs = setting
    points = frontier(found, model, costs, budgets=())
    scores, ranking = found.cmap.scores(), found.cmap.ranking()
    assert [point.selector for point in points] == [f"top_k={k}" for k in range(1, len(SHARED) + 1)]
    for k, point in enumerate(points, start=1):
        counted = costs.of(point.layers)
        assert set(point.layers) == set(ranking[:k])
        assert point.covered == pytest.approx(sum(scores[name] for name in ranking[:k]) / sum(scores.values()))
        assert (point.parameters_ratio, point.macs_ratio) == (counted.parameters_ratio, counted.macs_ratio)
    assert points[-1].covered == 1


def test_budgeted_points_keep_their_budgets(setting):
    found, model, costs = setting
    points = frontier(found, model, costs, budgets=(1.1, 1.5, 2.5))
    ratios = {"max_params": "parameters_ratio", "max_macs": "macs_ratio"}
    budgeted = [point for point in points if point.budgeted]
    assert {point.selector.partition("=")[0] for point in budgeted} == set(ratios)
    for point in budgeted:
        limit, _, budget = point.selector.partition("=")
        within = [p.covered for p in points if getattr(p, ratios[limit]) <= float(budget)]
        assert getattr(point, ratios[limit]) <= float(budget)
        assert point.covered == pytest.approx(max(within))
    assert len({tuple(sorted(point.layers)) for point in points}) == len(points)


def test_budgets_that_nothing_exceeds_or_nothing_fits_are_left_out(setting):
    found, model, costs = setting
    assert all(not point.budgeted for point in frontier(found, model, costs, budgets=(100.0, 1.000001)))


def test_optimal_points_are_those_that_none_beats(setting):
    found, model, costs = setting
    points = frontier(
        found, model, costs, chosen=choose(found, model, Selection(layers=[*SHARED, "blocks.2.conv1"]), TASKS)
    )
    marks = np.array([[p.covered, -p.parameters_ratio, -p.macs_ratio] for p in points])
    beaten = [bool(((marks >= mark).all(axis=1) & (marks > mark).any(axis=1)).any()) for mark in marks]
    assert [point.optimal for point in points] == [not is_beaten for is_beaten in beaten]
    assert any(beaten) and not all(beaten)


def test_groups_cover_what_they_part(setting):
    found, model, costs = setting
    groups = [["a", "b"], ["c"]]
    points = frontier(found, model, costs, groups=groups, budgets=())
    first, second, third = np.array([layer.conflicts.sum(axis=0) for layer in found.cmap.layers]).sum(
        axis=0
    )  # ab ac bc
    assert points[-1].covered == pytest.approx((second + third) / (first + second + third))
    assert points[-1].macs_ratio < 2.01
    assert all(split.groups == (("a", "b"), ("c",)) for split in points[0].layers.values())


def test_the_chosen_plan_is_marked_where_it_is(setting):
    found, model, costs = setting
    chosen = choose(found, model, Selection(top_k=2), TASKS)
    points = frontier(found, model, costs, chosen=chosen)
    assert [point.selector for point in points if point.chosen] == ["top_k=2"]


def test_another_chosen_plan_becomes_a_point(setting):
    found, model, costs = setting
    worst = found.cmap.ranking()[-1]
    points = frontier(found, model, costs, chosen=choose(found, model, Selection(layers=[worst]), TASKS))
    assert [(p.selector, tuple(p.layers), p.chosen) for p in points if p.chosen] == [("chosen", (worst,), True)]


def test_plans_that_cannot_be_made_are_an_error(setting):
    found, model, costs = setting
    with pytest.raises(PlanError, match="groups is 7"):
        frontier(found, model, costs, groups=7)


def test_the_table_has_a_line_for_every_point(setting):
    found, model, costs = setting
    points = frontier(found, model, costs, chosen=choose(found, model, Selection(top_k=2), TASKS))
    _, _, *lines, notes = frontier_table(points).splitlines()
    assert len(lines) == len(points) and "chosen" in notes
    for line, point in zip(lines, points, strict=True):
        assert point.selector in line and f"{point.macs_ratio:.3f}x" in line
        assert ("*" in line) == point.optimal and line.startswith(">") == point.chosen


def test_plain_values(setting):
    found, model, costs = setting
    point = frontier(found, model, costs, groups=[["a", "b"], ["c"]])[0]
    values = point.as_dict()
    assert values["layers"] == {name: [["a", "b"], ["c"]] for name in point.layers}
    assert {name: values[name] for name in ("covered", "macs_ratio", "optimal", "chosen")} == {
        "covered": point.covered,
        "macs_ratio": point.macs_ratio,
        "optimal": point.optimal,
        "chosen": False,
    }


@pytest.mark.parametrize("factor", [1, 10])  # the second needs a logarithmic scale
def test_the_picture_shows_every_point(setting, tmp_path, factor):
    found, model, costs = setting
    points = frontier(found, model, costs, chosen=choose(found, model, Selection(top_k=2), TASKS))
    points = [replace(point, macs_ratio=1 + factor * (point.macs_ratio - 1)) for point in points]
    figure = frontier_figure(points)
    for axes, cost in zip(figure.axes, ("parameters_ratio", "macs_ratio"), strict=True):
        drawn = [tuple(place) for marks in axes.collections if marks.get_gid() for place in marks.get_offsets()]
        expected = [(getattr(p, cost), 100 * p.covered) for p in points]
        assert np.array(sorted(drawn)) == pytest.approx(np.array(sorted(expected)))
        named = [text for text in axes.texts if text.get_gid() == "name"]
        assert "K=2" in [text.get_text() for text in named]
        boxes = [text.get_window_extent() for text in named]
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    draw_frontier(points, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
