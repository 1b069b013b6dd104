"""A plan is made from the pairs of its own tasks, and says what the map does not know of them."""

import logging
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import recon
from recon.branching.partition import Partition
from recon.errors import PlanError, UnknownNameError, UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import BINS, LayerConflicts
from recon.plans.costing.cost_model import CostModel
from recon.plans.grouping import by_conflict, conflict_graph, fewest_conflicts, partitions
from recon.plans.matching import match
from recon.plans.planning import choose
from recon.plans.selection import Selection
from recon.plans.trade_off import frontier
from tests.maps.from_cosines import floor_of, map_of
from tests.maps.test_conflict_map import score_map

ABC = ("a", "b", "c")
X = torch.randn(4, 6)


def pairs_map(layers, tasks=ABC):
    """A map of `{layer: {(task, task): (conflicts, steps in which the pair met)}}`; the others never met."""
    pairs = list(combinations(tasks, 2))
    records = []
    for name, counts in layers.items():
        conflicts, observed = np.array([counts.get(pair, (0, 0)) for pair in pairs]).T
        histogram = np.zeros(BINS, dtype=np.int64)
        histogram[[0, -1]] = conflicts.sum(), (observed - conflicts).sum()
        in_quarters = [np.stack([c, *[np.zeros_like(c)] * 3]) for c in (conflicts, observed)]
        records.append(LayerConflicts(name, "Linear", {}, histogram, *in_quarters))
    steps = max(seen for counts in layers.values() for _, seen in counts.values())
    return ConflictMap(tuple(tasks), -0.1, 4 * steps, 0, (steps,) * 4, records)


class Net(nn.Module):
    """Layers one after the other, and a head for each task."""

    def __init__(self, tasks=ABC, layers=("x", "y", "z")):
        super().__init__()
        for name in layers:
            setattr(self, name, nn.Linear(6, 6))
        self.names = layers
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in tasks})

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return {task: head(x) for task, head in self.heads.items()}


def chosen(cmap, tasks=None, model=None, groups="per-task", threshold=None, **how):
    """What `choose` makes of a map."""
    tasks = tasks or cmap.tasks
    model = model or Net(tasks)
    costs = CostModel(model, tasks, X) if {"max_params", "max_macs"} & set(how) else None
    return choose(match(cmap, model), model, Selection(**how), tasks, groups=groups, threshold=threshold, costs=costs)


# In x only c fights, in y only a and b, in z all a little.
FIGHTS = pairs_map(
    {
        "x": {("a", "b"): (0, 50), ("a", "c"): (50, 50), ("b", "c"): (50, 50)},
        "y": {("a", "b"): (40, 50), ("a", "c"): (0, 50), ("b", "c"): (0, 50)},
        "z": {("a", "b"): (10, 50), ("a", "c"): (10, 50), ("b", "c"): (10, 50)},
    }
)


def test_conflicts_of_other_tasks_choose_no_layer():
    assert list(recon.plan(FIGHTS, Net(), top_k=1).layers) == ["x"]
    assert list(recon.plan(FIGHTS, Net("ab"), top_k=1, tasks=("a", "b")).layers) == ["y"]
    assert list(recon.plan(FIGHTS, Net("bca"), top_k=1, tasks=("b", "c", "a")).layers) == ["x"]


@pytest.mark.parametrize("how", [{"share": 0.8}, {"max_params": 1.5}, {"top_k": 1}], ids=lambda how: next(iter(how)))
def test_every_way_to_choose_goes_by_the_pairs_of_the_plans_tasks(how):
    choice = chosen(FIGHTS, ("a", "b"), **how)
    assert list(choice.plan.layers) == ["y"]
    assert choice.scores == {"x": 0, "y": 40, "z": 10} and choice.covered == 40 / 50
    assert not choice.notes


def test_coverage_leaves_out_what_stays_within_groups():
    choice = chosen(FIGHTS, layers=["x", "z"], groups=[["a", "b"], ["c"]])
    assert choice.parted == {"x": 100, "y": 0, "z": 20}
    assert choice.covered == 120 / 170


def test_auto_asks_of_the_plans_tasks():
    rng = np.random.default_rng(0)

    def cosines(*rates):
        return np.stack([np.where(rng.random(200) < rate, -0.5, 0.5) for rate in rates], axis=1)

    cmap = map_of({"x": cosines(0.05, 0.9, 0.9), "y": cosines(0.8, 0.05, 0.05), "z": cosines(0.1, 0.1, 0.1)}, ABC)
    assert list(chosen(cmap, auto=True).plan.layers) == ["x"]
    assert list(chosen(cmap, ("a", "b"), auto=True).plan.layers) == ["y"]


def test_a_map_of_other_tasks_is_scored_over_all_its_pairs_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        plan = recon.plan(FIGHTS, Net("adb"), top_k=1, tasks=("a", "d", "b"))
    assert list(plan.layers) == ["x"]
    assert (
        "does not know d: the layers are scored by the conflicts of all the tasks that it was made for" in caplog.text
    )


def test_a_map_without_counts_by_pair_says_that_others_are_counted():
    cmap = score_map({"x": 5, "y": 3}, tasks=ABC)
    choice = chosen(cmap, ("a", "b"), top_k=1)
    assert list(choice.plan.layers) == ["x"] and "holds no counts by pair" in choice.notes[0]
    with pytest.raises(UsageError, match="no counts by task pair"):
        chosen(cmap, ("a", "b"), top_k=1, by="rate")


# Pairs that never or rarely met.

SEPARATE = pairs_map({"x": {("a", "b"): (11, 30)}, "y": {("a", "b"): (9, 30)}})


def test_a_pair_that_never_met_is_no_pair_without_conflict(caplog):
    with caplog.at_level(logging.WARNING):
        plan = recon.plan(SEPARATE, Net(), top_k=1, groups=2)
    assert plan.layers == {"x": Partition.of_groups([["a", "b"], ["c"]], ABC)}
    assert "a-c, b-c never met in a step of the profile: nothing is known of their conflict" in caplog.text
    choice = chosen(SEPARATE, top_k=1, groups=2)
    assert choice.covered == 0 and choice.unmeasured == [("a", "c"), ("b", "c")]
    assert chosen(SEPARATE, ("a", "b"), top_k=1).unmeasured == []


def test_groups_that_join_a_pair_that_never_met_say_so():
    choice = chosen(SEPARATE, top_k=1, groups=[["a", "c"], ["b"]])
    assert choice.covered == 11 / 20
    assert any("keep a-c together, though nothing is known" in note for note in choice.notes)
    apart = chosen(SEPARATE, top_k=1, groups=[["a", "b"], ["c"]])
    assert not any("together" in note for note in apart.notes)


FOUR = tuple("abcd")


def test_a_pair_that_never_met_is_taken_to_conflict_like_the_others():
    counts = dict.fromkeys(combinations(FOUR, 2), (60, 100)) | {("c", "d"): (10, 100), ("a", "b"): (0, 0)}
    cmap = pairs_map({"x": counts}, FOUR)
    graph = conflict_graph(cmap, FOUR)
    assert graph["a"]["b"]["rate"] == pytest.approx(250 / 500, abs=1e-5) and graph["a"]["b"]["observed"] == 0
    assert graph["a"]["b"]["weight"] == pytest.approx(50, abs=1e-3)
    assert fewest_conflicts(graph, 3) == Partition.of_groups([["a"], ["b"], ["c", "d"]], FOUR)
    # Of two groups, a and b share one: 10 and 50 within are fewer than 60 and 60, or 10 and 60 twice.
    found = chosen(cmap, FOUR, top_k=1, groups=2)
    assert found.plan.layers["x"] == Partition.of_groups([["a", "b"], ["c", "d"]], FOUR)
    assert any("keep a-b together" in note for note in found.notes)


def test_of_equals_the_pair_that_met_is_preferred():
    cmap = pairs_map({"x": {("a", "b"): (0, 0), ("a", "c"): (20, 50), ("b", "c"): (20, 50)}})
    assert ["a", "b"] not in map(list, partitions(cmap, ABC, 2)["x"].groups)
    quiet = pairs_map({"x": {("a", "b"): (0, 0), ("a", "c"): (0, 50), ("b", "c"): (0, 50)}})
    assert ["a", "b"] not in map(list, partitions(quiet, ABC, 2)["x"].groups)
    assert ["a", "b"] not in map(list, by_conflict(quiet, ABC)["x"].groups)


def test_groups_go_by_how_often_a_pair_conflicts_where_it_meets():
    cmap = pairs_map({"x": {("a", "b"): (38, 100), ("a", "c"): (10, 10), ("b", "c"): (10, 10)}})
    assert partitions(cmap, ABC, 2)["x"] == Partition.of_groups([["a", "b"], ["c"]], ABC)


def test_tasks_that_never_met_cannot_be_grouped():
    cmap = pairs_map({"x": {("a", "b"): (11, 30)}}, FOUR)
    for groups in (2, "conflict"):
        with pytest.raises(PlanError, match=r"No two of the tasks b, c, d ever met .*joint_loader"):
            partitions(cmap, ("b", "c", "d"), groups)
    with pytest.raises(PlanError, match=r"No two of the tasks c, d ever met .*nothing is known of their conflicts"):
        chosen(cmap, ("c", "d"), top_k=1)


def test_pairs_that_rarely_met_are_named():
    cmap = pairs_map({"x": {("a", "b"): (38, 100), ("a", "c"): (3, 5), ("b", "c"): (60, 100)}})
    (note,) = chosen(cmap, top_k=1).notes
    assert "met in few of the profile's steps (a-c in 5)" in note and "By rate" in note
    assert not chosen(cmap, ("a", "b"), top_k=1).notes


# By count, by rate, by excess.


def test_by_rate_a_layer_that_always_conflicts_comes_before_one_that_often_does():
    cmap = pairs_map({"x": {("a", "b"): (34, 90)}, "y": {("a", "b"): (10, 10)}}, ("a", "b"))
    assert list(chosen(cmap, top_k=1).plan.layers) == ["x"]
    choice = chosen(cmap, top_k=1, by="rate")
    assert list(choice.plan.layers) == ["y"] and choice.by == "rate"
    assert choice.covered == pytest.approx(1 / (1 + 34 / 90))


def with_floor(rates, floors, tasks=("a", "b"), steps=200):
    """A map in whose layers the pairs and the tasks themselves conflict in these shares of the steps."""
    rng = np.random.default_rng(0)
    pairs = len(list(combinations(tasks, 2)))

    def cosines(rate, width):
        return np.where(rng.permuted(np.tile(np.arange(steps) < round(rate * steps), (width, 1)), axis=1).T, -0.5, 0.5)

    return map_of(
        {name: cosines(rate, pairs) for name, rate in rates.items()},
        tasks,
        floors={
            name: floor_of(cosines(rate, len(tasks)), np.full((steps, 2, pairs), 0.5)) for name, rate in floors.items()
        },
    )


NOISY = with_floor({"x": 0.6, "y": 0.4, "z": 0.05}, {"x": 0.55, "y": 0.0, "z": 0.05})


def test_by_excess_noise_is_no_conflict():
    assert list(chosen(NOISY, top_k=1).plan.layers) == ["x"]
    choice = chosen(NOISY, top_k=1, by="excess")
    assert list(choice.plan.layers) == ["y"]
    assert choice.scores == pytest.approx({"x": 0.05, "y": 0.4, "z": 0.0})
    assert choice.covered == pytest.approx(0.4 / 0.45)


def test_auto_says_of_each_layer_whether_it_is_conflict_or_noise():
    choice = chosen(NOISY, auto=True)
    assert list(choice.plan.layers) == ["y"] and choice.by == "excess"
    assert choice.sure == NOISY.above_floor_probability()
    assert choice.sure["y"] >= 0.95 > max(choice.sure["x"], choice.sure["z"])
    assert "above the noise floor with a probability of at least 95 %" in choice.reason
    by_count = chosen(NOISY, auto=True, by="count")
    assert list(by_count.plan.layers) == ["x", "y"] and not by_count.sure


def test_auto_finds_none_where_all_is_noise():
    cmap = with_floor({"x": 0.3, "y": 0.25}, {"x": 0.3, "y": 0.3})
    with pytest.raises(PlanError, match="No layer of the map has a conflict above its noise floor"):
        chosen(cmap, auto=True)
    little = with_floor({"x": 0.3, "y": 0.31}, {"x": 0.3, "y": 0.3})
    with pytest.raises(PlanError, match=r"No layer conflicts above the noise floor .* within noise"):
        chosen(little, auto=True)


def test_a_map_without_a_floor_cannot_tell_noise():
    with pytest.raises(UsageError, match=r"no noise floor.*`recon profile` makes one by default"):
        chosen(FIGHTS, top_k=1, by="excess")


def test_pairs_without_a_floor_are_named():
    cmap = with_floor({"x": 0.6, "y": 0.4, "z": 0.1}, {"x": 0.1, "y": 0.1})
    (note,) = chosen(cmap, top_k=1, by="excess").notes
    assert "In 1 layer (z) the noise floor of a-b was not measured" in note


def test_another_way_to_score_is_refused():
    with pytest.raises(UsageError, match=r"by is 'score'\. Choose 'count', 'rate', 'excess'"):
        recon.plan(FIGHTS, Net(), top_k=1, by="score")


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_covers_the_most_of_scores_that_are_no_whole_numbers(seed):
    rng = np.random.default_rng(seed)
    names = ("u", "v", "w", "x", "y")
    pairs = list(combinations(ABC, 2))
    cmap = pairs_map(
        {name: {pair: (int(rng.integers(0, 30)), int(rng.integers(30, 60))) for pair in pairs} for name in names}
    )
    model = Net(ABC, names)
    for index, name in enumerate(names):  # of different sizes
        setattr(model, name, nn.Linear(6, 6, bias=index % 2 == 0))
    costs, rates = CostModel(model, ABC, X), cmap.scores(by="rate")
    split = Partition.per_task(ABC)
    subsets = [subset for k in range(1, 6) for subset in combinations(names, k)]
    for limit, budget in (("max_params", 1.9), ("max_params", 3.0), ("max_macs", 1.8)):
        ratio = {"max_params": "parameters_ratio", "max_macs": "macs_ratio"}[limit]
        fitting = [s for s in subsets if getattr(costs.of(dict.fromkeys(s, split)), ratio) <= budget]
        best = max(sum(rates[name] for name in subset) for subset in fitting)
        found = chosen(cmap, model=model, by="rate", **{limit: budget})
        assert sum(rates[name] for name in found.plan.layers) == pytest.approx(best, abs=1e-5)


# Say nothing where nothing is.

QUIET = pairs_map({name: dict.fromkeys(combinations(ABC, 2), (0, 50)) for name in ("x", "y", "z")})
BY_SCORE = {
    "top_k": {"top_k": 1},
    "share": {"share": 0.5},
    "budget": {"max_macs": 3},
    "auto": {"auto": True},
    "rate": {"top_k": 2, "by": "rate"},
    "among": {"top_k": 1, "layers": "x|y"},
}


@pytest.mark.parametrize("way", BY_SCORE)
def test_a_map_without_a_conflict_chooses_nothing(way):
    with pytest.raises(PlanError, match=r"No layer of the map has a conflict at S=-0\.1, so there is nothing"):
        chosen(QUIET, **BY_SCORE[way])


def test_a_map_without_a_conflict_between_these_tasks_chooses_nothing():
    cmap = pairs_map({"x": {("a", "b"): (0, 50), ("a", "c"): (50, 50), ("b", "c"): (50, 50)}})
    with pytest.raises(PlanError, match=r"No layer of the map has a conflict between a, b at S=-0\.1"):
        chosen(cmap, ("a", "b"), top_k=1)
    assert list(chosen(cmap, ("a", "c"), top_k=1).plan.layers) == ["x"]


def test_without_a_conflict_layers_can_be_named_and_controls_taken():
    assert list(chosen(QUIET, layers=["y"]).plan.layers) == ["y"]
    assert list(chosen(QUIET, layers="x|z").plan.layers) == ["x", "z"]
    assert list(chosen(QUIET, top_k=2, select="last").plan.layers) == ["y", "z"]
    assert chosen(QUIET, layers=["y"]).covered == 0


def test_layers_that_came_in_without_a_conflict_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        recon.plan(FIGHTS, Net("ac"), top_k=3, tasks=("a", "c"))
    assert "Only 2 of the 3 chosen layers have a conflict; y came in by their order in the model" in caplog.text
    assert not chosen(FIGHTS, ("a", "c"), top_k=2).notes


# Which layers.


def test_a_selector_chooses_among_some_layers():
    assert list(chosen(FIGHTS, top_k=1, layers=["y", "z"]).plan.layers) == ["y"]
    assert list(chosen(FIGHTS, top_k=1, layers="y|z").plan.layers) == ["y"]
    assert list(chosen(FIGHTS, top_k=1, exclude="[xy]").plan.layers) == ["z"]
    assert list(chosen(FIGHTS, share=1, exclude=["x", "y"]).plan.layers) == ["z"]
    assert list(chosen(FIGHTS, max_macs=3, exclude="x").plan.layers) == ["y", "z"]
    assert list(chosen(FIGHTS, layers=".", exclude="y").plan.layers) == ["x", "z"]
    assert list(chosen(FIGHTS, layers=["x", "y"], exclude="y").plan.layers) == ["x"]


def test_what_is_left_out_is_still_conflict():
    choice = chosen(FIGHTS, top_k=1, exclude="x")
    assert choice.scores == {"x": 100, "y": 40, "z": 30} and choice.covered == 40 / 170


def test_units_are_branched_together():
    model = nn.ModuleDict({"block": nn.ModuleDict({"p": nn.Linear(6, 6), "q": nn.Linear(6, 6)}), "x": nn.Linear(6, 6)})
    layer = {layer.name: layer for layer in FIGHTS.layers}
    cmap = replace(
        FIGHTS,
        layers=[
            replace(layer["y"], name="block.p"),
            replace(layer["z"], name="block.q"),
            replace(layer["z"], name="x"),
        ],
    )
    choice = chosen(cmap, model=model, top_k=1, units="block")
    assert list(choice.plan.layers) == ["block.p", "block.q"]
    assert choice.scores == {"block": 70, "x": 30} and choice.covered == 0.7
    with pytest.raises(PlanError, match="but the map has 2 shared layers to choose among"):
        chosen(cmap, model=model, top_k=3, units="block")


def test_the_frontier_chooses_among_the_same_layers():
    model = Net()
    costs = CostModel(model, ABC, X)
    points = frontier(match(FIGHTS, model), model, costs, by="rate", exclude="x", budgets=())
    assert [list(point.layers) for point in points] == [["y"], ["y", "z"]]
    total = sum(FIGHTS.scores(by="rate").values())
    assert points[0].covered == pytest.approx(FIGHTS.scores(by="rate")["y"] / total)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"top_k": 1, "layers": "w"}, UnknownNameError, "no layer named 'w'"),
        ({"top_k": 1, "exclude": "w"}, UnknownNameError, "no layer named 'w'"),
        ({"top_k": 1, "exclude": "."}, UsageError, "leaves none of the 3 layers"),
        ({"top_k": 1, "exclude": "x("}, UsageError, "not a regular expression"),
        ({"top_k": 3, "exclude": "x"}, PlanError, "the map has 2 shared layers to choose among"),
        ({"layers": ["x"], "units": "x"}, PlanError, "goes with top_k"),
        ({"exclude": "x"}, PlanError, "Given: none"),
    ],
    ids=["layers", "exclude", "all excluded", "broken", "k", "units of names", "exclude alone"],
)
def test_wrong_layers(how, error, message):
    with pytest.raises(error, match=message):
        chosen(FIGHTS, **how)
