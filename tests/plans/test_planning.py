import logging
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import recon
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan
from recon.branching.saving import load_plan
from recon.errors import CheckpointError, MapMismatchError, PlanError, UnknownNameError, UsageError
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import LayerConflicts
from recon.plans.matching import match
from recon.plans.planning import choose
from recon.plans.selection import Selection
from tests.maps.test_conflict_map import make_map, score_map
from tests.plans.test_grouping import pair_map

TASKS = ("a", "b")
FOUR = ("a", "b", "c", "d")


def net(**shapes):
    """A model whose layers have the names and (2, 3) weights of `make_map`'s, unless told otherwise."""
    sizes = {"conv": (3, 2), "norm": (3, 2), "fc": (3, 2)} | shapes
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def test_top_k_takes_the_highest_scores():
    cmap = make_map()
    for k in (1, 2, 3):
        plan = recon.plan(cmap, net(), top_k=k)
        assert set(plan.layers) == set(cmap.ranking()[:k])
        assert set(plan.layers.values()) == {Partition.per_task(TASKS)}


def test_the_threshold_of_the_scores_can_be_chosen():
    cmap = make_map(seed=4)
    thresholds = [-0.9, -0.5, -0.1, 0.0]
    firsts = [next(iter(recon.plan(cmap, net(), top_k=1, threshold=t).layers)) for t in thresholds]
    assert firsts == [cmap.ranking(t)[0] for t in thresholds]
    assert len(set(firsts)) > 1


def test_a_plan_lists_its_layers_in_model_order():
    assert list(recon.plan(make_map(), net(), layers=["fc", "conv"]).layers) == ["conv", "fc"]


def test_random_is_seeded_and_has_the_same_size():
    cmap = make_map(layers=("conv", "norm", "fc"))
    plans = [tuple(recon.plan(cmap, net(), top_k=2, select="random", seed=seed).layers) for seed in range(20)]
    assert plans == [tuple(recon.plan(cmap, net(), top_k=2, select="random", seed=seed).layers) for seed in range(20)]
    assert len(set(plans)) == 3 and all(len(plan) == 2 for plan in plans)


@pytest.mark.parametrize("k", [0, -1, 4, 100])
def test_k_out_of_range(k):
    with pytest.raises(PlanError, match="between 1 and 3"):
        recon.plan(make_map(), net(), top_k=k)


@pytest.mark.parametrize("choice", [{}, {"exclude": "conv"}], ids=["none", "what is left"])
def test_one_way_to_choose(choice):
    with pytest.raises(PlanError, match="in one way"):
        recon.plan(make_map(), net(), **choice)


def test_an_unknown_selector():
    with pytest.raises(PlanError, match="Choose 'top', 'random'"):
        recon.plan(make_map(), net(), top_k=1, select="best")


def test_an_unknown_layer_gets_the_nearest_names():
    with pytest.raises(UnknownNameError, match=r"no layer named 'norn'. Did you mean 'norm'"):
        recon.plan(make_map(), net(), layers=["norn"])


def test_a_map_of_another_architecture():
    with pytest.raises(MapMismatchError, match=r"none of its 3 layers .*head1"):
        recon.plan(make_map(), nn.ModuleDict({"head1": nn.Linear(3, 2)}), top_k=1)


def test_a_map_with_another_stem_serves_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        plan = recon.plan(make_map(), net(conv=(4, 2)), top_k=3)
    assert set(plan.layers) == {"conv", "norm", "fc"}
    assert "1 of the 3 matched layers have other parameter shapes in the model than in the map (conv)" in caplog.text


def test_a_map_with_layers_that_the_model_lacks_serves_with_a_warning(caplog):
    cmap = make_map(layers=("conv", "gone", "norm", "fc"))
    with caplog.at_level(logging.WARNING):
        plan = recon.plan(cmap, net(), top_k=3)
    assert set(plan.layers) == {"conv", "norm", "fc"}
    assert "1 of the map's 4 layers are not in this model (gone); the other 3 are ranked" in caplog.text
    with pytest.raises(PlanError, match="the map has 3 shared layers of this model"):
        recon.plan(cmap, net(), top_k=4)


def test_a_map_that_fits_gives_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        recon.plan(make_map(), net(), top_k=1)
    assert not caplog.text


def test_a_map_of_two_tasks_serves_a_model_of_three():
    plan = recon.plan(make_map(), net(), top_k=2, tasks=("x", "y", "z"))
    assert plan.tasks == ("x", "y", "z")
    assert set(plan.layers) == set(make_map().ranking()[:2])
    assert set(plan.layers.values()) == {Partition.per_task(("x", "y", "z"))}
    assert recon.plan(make_map(), net(), layers=["fc"], tasks=("x", "y", "z")).tasks == ("x", "y", "z")


def test_a_map_that_does_not_name_its_tasks_needs_them():
    cmap = score_map({"fc": 3, "conv": 9})
    with pytest.raises(PlanError, match=r"Pass the model's: tasks="):
        recon.plan(cmap, net(), top_k=1)
    assert list(recon.plan(cmap, net(), top_k=1, tasks=TASKS).layers) == ["conv"]


def test_ties_of_a_map_in_another_order_go_by_model_order():
    cmap = score_map({"fc": 3, "norm": 3, "conv": 3})
    assert cmap.ranking() == ["fc", "norm", "conv"]
    assert list(recon.plan(cmap, net(), top_k=2, tasks=TASKS).layers) == ["conv", "norm"]


def test_a_map_of_scores_has_its_own_threshold_alone():
    cmap = score_map({"fc": 3, "conv": 9}, threshold=-0.02)
    assert list(recon.plan(cmap, net(), top_k=1, tasks=TASKS, threshold=-0.02).layers) == ["conv"]
    with pytest.raises(UsageError, match=r"only its scores at S=-0\.02"):
        recon.plan(cmap, net(), top_k=1, tasks=TASKS, threshold=-0.1)


def test_a_rename_reaches_the_model():
    inside = nn.ModuleDict({"backbone": net()})
    plan = recon.plan(make_map(), inside, top_k=3, rename={"": "backbone"})
    assert list(plan.layers) == ["backbone.conv", "backbone.norm", "backbone.fc"]


def test_a_match_serves_in_place_of_the_map(caplog):
    cmap = make_map(layers=("x.conv", "x.gone", "x.fc"))
    found = match(cmap, net(), {"x": ""})
    with caplog.at_level(logging.WARNING):
        plan = recon.plan(found, net(), top_k=1)
    assert not caplog.text  # its holder has seen it
    assert plan == recon.plan(cmap, net(), top_k=1, rename={"x": ""})
    with pytest.raises(PlanError, match="rename="):
        recon.plan(found, net(), top_k=1, rename={"x": ""})


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"x": ["a", "a"]}, "twice"),
        ({"x": [["a"], ["a", "b"]]}, "twice"),
        ({"x": ["a"]}, "leave out"),
        ({"x": ["a", "b", "z"]}, "not one of the tasks"),
        ({"x": [["a", "b"]]}, "one group"),
        ({}, "names no layer"),
    ],
)
def test_a_plan_that_is_no_partition(groups, message):
    with pytest.raises(PlanError, match=message):
        BranchPlan.grouped(groups, TASKS)


def test_a_layer_named_twice():
    with pytest.raises(PlanError, match="names x twice"):
        BranchPlan.per_task(["x", "y", "x"], TASKS)


@pytest.mark.parametrize("tasks", [(), ("a",), ("a", "a")])
def test_a_plan_needs_two_tasks(tasks):
    with pytest.raises(PlanError):
        BranchPlan.per_task(["x"], tasks)


def test_a_plan_by_another_path_of_the_same_module():
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["again"] = model["first"]
    assert list(BranchPlan.per_task(["again"], TASKS).on(model).layers) == ["first"]


# Other ways to choose.


class Chain(nn.Module):
    """Layers one after the other, with the names of `make_map`'s, and a head for each task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Linear(6, 30), nn.LayerNorm(30), nn.Linear(30, 3)
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in tasks})

    def forward(self, x):
        x = self.fc(self.norm(self.conv(x)))
        return {task: head(x) for task, head in self.heads.items()}


INPUTS = torch.randn(4, 6)


def scored(**scores):
    return score_map(scores, tasks=TASKS)


def layers_of(cmap, model=None, **options):
    return list(recon.plan(cmap, model or Chain(), INPUTS, **options).layers)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.01, ["norm"]), (0.6, ["norm"]), (0.61, ["norm", "fc"]), (0.9, ["norm", "fc"]), (1, ["conv", "norm", "fc"])],
)
def test_a_share_of_the_conflict_takes_the_fewest_layers_that_hold_it(share, expected):
    assert layers_of(scored(conv=1, norm=6, fc=3), share=share) == expected


def test_a_share_that_a_layer_holds_exactly_is_held():
    assert 0.55 * 100 > 55  # in floating point
    assert layers_of(scored(conv=25, norm=55, fc=20), share=0.55) == ["norm"]


def test_a_share_leaves_out_layers_that_never_conflict():
    assert layers_of(scored(conv=0, norm=6, fc=3), share=1) == ["norm", "fc"]
    with pytest.raises(PlanError, match="No layer of the map has a conflict"):
        layers_of(scored(conv=0, norm=0), share=0.5)


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_a_share_out_of_range(share):
    with pytest.raises(PlanError, match="above 0 and at most 1"):
        layers_of(scored(conv=1), share=share)


def test_budgets_cover_the_most_conflict_that_fits():
    cmap = scored(conv=10, norm=5, fc=4)
    # Of 371 parameters (210, 60, 93 and 8 of the heads), and 6 * 30 + 30 * 3 + 6 multiply-adds a sample.
    assert layers_of(cmap, max_params=1.2) == ["norm"]
    assert layers_of(cmap, max_params=1.5) == ["norm", "fc"]
    assert layers_of(cmap, max_params=1.6) == ["conv"]
    assert layers_of(cmap, max_macs=1.4) == ["norm", "fc"]
    assert layers_of(cmap, max_macs=1.4, max_params=1.2) == ["norm"]
    assert layers_of(cmap, max_macs=2) == ["conv", "norm", "fc"]


def test_a_budgeted_plan_keeps_its_promise_when_it_is_converted():
    model = Chain()
    branched = recon.convert(model, recon.plan(scored(conv=9, norm=5, fc=4), model, INPUTS, max_macs=1.4), INPUTS)
    plain, found = recon.costs(model, None, INPUTS), recon.costs(branched, None, INPUTS)
    assert plain.macs < found.macs <= 1.4 * plain.macs


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_params": 0.99}, "max_params is 0.99"),
        ({"max_macs": 0.5}, "max_macs is 0.5"),
        ({"max_params": 1.1}, r"No layer fits max_params=1.1. The cheapest, 'norm', would need 1\.\d+x the parameters"),
        ({"max_macs": 1.1, "max_params": 3}, "No layer fits max_params=3 and max_macs=1.1. The cheapest, 'norm'"),
    ],
)
def test_budgets_that_nothing_fits(budget, message):
    with pytest.raises(PlanError, match=message):
        layers_of(scored(conv=9, norm=5, fc=4), **budget)


def test_a_budget_needs_inputs_to_count_on():
    with pytest.raises(PlanError, match=r"max_macs=1.25 are counted on a batch of inputs. Pass it: example_inputs="):
        recon.plan(scored(conv=1), Chain(), max_macs=1.25)


def test_auto_takes_what_conflicts_more_than_the_mean_layer_beyond_noise(caplog):
    rng = np.random.default_rng(0)
    rates = {"conv": 30, "norm": 3, "fc": 14}  # the mean is about 16
    records = [
        LayerConflicts(name, "Linear", {}, None, None, None, series=rng.poisson(rate, 100), score=None)
        for name, rate in rates.items()
    ]
    for record in records:
        record.score = int(record.series.sum())
    cmap = ConflictMap(TASKS, -0.1, 100, 0, (25,) * 4, records, bin_steps=1)
    with caplog.at_level(logging.INFO):
        assert layers_of(cmap, auto=True) == ["conv"]
    assert "1 of 3 shared layers: they conflict more than the mean layer" in caplog.text
    assert "in at least 95 % of resampled trainings; the last is conv" in caplog.text


def test_auto_finds_none_in_a_map_of_noise():
    series = np.tile([0, 4, 1, 3], 25)
    records = [
        LayerConflicts(n, "", {}, None, None, None, np.roll(series, i), 200) for i, n in enumerate(("conv", "fc"))
    ]
    cmap = ConflictMap(TASKS, -0.1, 100, 0, (25,) * 4, records, bin_steps=1)
    with pytest.raises(PlanError, match=r"within noise\. Profile more steps"):
        layers_of(cmap, auto=True)


def test_auto_needs_scores_over_time_at_the_maps_threshold():
    with pytest.raises(UsageError, match="holds no scores over time"):
        layers_of(scored(conv=1), auto=True)
    with pytest.raises(PlanError, match=r"at the map's own S=-0\.1"):
        layers_of(make_map(), auto=True, threshold=-0.2)


@pytest.mark.parametrize(
    ("select", "expected"),
    [("first", ["conv", "norm"]), ("last", ["norm", "fc"]), ("top", ["conv", "fc"])],
)
def test_controls_at_equal_k(select, expected):
    assert layers_of(scored(conv=9, norm=5, fc=6), top_k=2, select=select) == expected


def test_the_norms_alone():
    cmap = scored(conv=9, norm=5, fc=6)
    assert layers_of(cmap, select="norms") == layers_of(cmap, select="norms", top_k=1) == ["norm"]
    with pytest.raises(PlanError, match="the map has 1 norms among its shared layers"):
        layers_of(cmap, select="norms", top_k=2)
    with pytest.raises(PlanError, match="finds no norm among the shared layers"):
        layers_of(scored(conv=1, fc=1), select="norms")


def test_controls_at_the_parameters_of_a_plan():
    cmap = scored(conv=9, norm=5, fc=6)
    like = recon.plan(cmap, Chain(), layers=["fc", "norm"])  # 93 + 60
    assert layers_of(cmap, like=like, select="last") == ["norm", "fc"]
    assert layers_of(cmap, like=recon.plan(cmap, Chain(), layers=["conv"]), select="first") == ["conv"]
    with pytest.raises(PlanError, match=r"adds 153 parameters, and 'conv', the first in line, alone adds 210"):
        layers_of(cmap, like=like, select="first")
    found = [tuple(layers_of(cmap, like=like, select="random", seed=seed)) for seed in range(12)]
    assert set(found) == {("norm", "fc")}  # conv is passed over
    with pytest.raises(PlanError, match="makes a control"):
        layers_of(cmap, like=like)


def test_controls_at_the_parameters_of_a_plan_with_other_groups():
    """What counts is the parameters that copies add: two groups of four tasks make one copy, four make three."""
    counts = dict.fromkeys(combinations(FOUR, 2), 5)
    cmap = pair_map({"conv": counts, "norm": counts, "fc": counts}, FOUR)
    one_copy = recon.plan(cmap, Chain(FOUR), layers=["conv"], groups=2)  # adds 210
    assert layers_of(cmap, Chain(FOUR), like=one_copy, select="last", groups=2) == ["norm", "fc"]  # 93 + 60
    with pytest.raises(PlanError, match=r"adds 210 parameters, and 'fc', the first in line, alone adds 279"):
        layers_of(cmap, Chain(FOUR), like=one_copy, select="last")
    copies = recon.plan(cmap, Chain(FOUR), layers=["fc"])  # adds 279
    assert layers_of(cmap, Chain(FOUR), like=copies, select="first", groups=2) == ["conv", "norm"]  # 210 + 60


def test_controls_within_a_budget():
    cmap = scored(conv=9, norm=5, fc=6)
    assert layers_of(cmap, select="last", max_params=1.3) == ["fc"]  # norm would make it 1.41
    assert layers_of(cmap, select="random", max_macs=1.4, seed=1) == ["norm", "fc"]
    with pytest.raises(PlanError, match=r"No layer fits max_params=1\.3\. The cheapest, 'conv'"):
        layers_of(cmap, select="first", max_params=1.3)


def test_a_regular_expression_matches_whole_names_of_shared_layers():
    cmap = scored(conv=9, norm=5, fc=6)
    assert layers_of(cmap, layers="conv|.*o.*m") == ["conv", "norm"]
    assert layers_of(cmap, layers="fc") == ["fc"]
    with pytest.raises(UnknownNameError, match=r"no layer named 'nor'. Did you mean 'norm'.* whole names"):
        layers_of(cmap, layers="nor")
    with pytest.raises(UnknownNameError, match=r"no layer named 'heads\.\*'"):
        layers_of(cmap, layers="heads.*")
    with pytest.raises(UsageError, match="not a regular expression"):
        layers_of(cmap, layers="conv(")


@pytest.mark.parametrize(
    ("choice", "given"),
    [
        ({"top_k": 1, "share": 0.5}, "top_k and share"),
        ({"top_k": 1, "max_macs": 1.2}, "top_k and max_macs"),
        ({"auto": True, "top_k": 1, "layers": ["fc"]}, "top_k and auto"),
        ({"share": 0.5, "max_macs": 1.2, "max_params": 1.2}, "share and max_params/max_macs"),
        ({"select": "random"}, "none"),
    ],
)
def test_two_ways_at_once(choice, given):
    with pytest.raises(PlanError, match=f"Given: {given}"):
        layers_of(scored(conv=1, fc=2), **choice)


@pytest.mark.parametrize("choice", [{"share": 0.5}, {"auto": True}, {"layers": ["fc"]}])
def test_controls_of_what_has_none(choice):
    with pytest.raises(PlanError, match="select='last' works with"):
        layers_of(scored(conv=1, fc=2), select="last", **choice)


# Groups.


def test_groups_of_tasks_share_their_copies():
    camps = {pair: 1 if pair in (("a", "c"), ("b", "d")) else 30 for pair in combinations(FOUR, 2)}
    cmap = pair_map({"conv": camps, "fc": camps}, FOUR)
    expected = Partition.of_groups([["a", "c"], ["b", "d"]], FOUR)
    for groups in (2, "conflict", [["a", "c"], ["b", "d"]]):
        assert recon.plan(cmap, Chain(FOUR), top_k=1, groups=groups).layers == {"conv": expected}
    with pytest.raises(PlanError, match=r"leave out \['d'\]"):
        recon.plan(cmap, Chain(FOUR), top_k=1, groups=[["a", "b"], ["c"]])
    with pytest.raises(PlanError, match="2 to 4 groups"):
        recon.plan(cmap, Chain(FOUR), top_k=1, groups=5)


def test_a_budget_goes_farther_with_groups():
    counts = dict.fromkeys(combinations(FOUR, 2), 5)
    cmap = pair_map({"conv": counts, "norm": counts, "fc": counts}, FOUR)
    with pytest.raises(PlanError, match="No layer fits"):
        layers_of(cmap, Chain(FOUR), max_macs=1.4)
    assert layers_of(cmap, Chain(FOUR), max_macs=1.4, groups=2) == ["norm", "fc"]


def test_a_named_layer_that_the_map_does_not_score():
    cmap = pair_map({"conv": {("a", "b"): 3}}, FOUR)
    plan = recon.plan(cmap, Chain(FOUR), layers=["fc"], groups=2)
    assert list(plan.layers) == ["fc"] and len(plan.layers["fc"].groups) == 2
    with pytest.raises(PlanError, match="but it has no layer 'fc'"):
        recon.plan(cmap, Chain(FOUR), layers=["fc"], groups="conflict")


def test_a_choice_tells_what_it_covers():
    counts = {("a", "b"): 6, ("a", "c"): 2, ("b", "c"): 1}
    cmap = pair_map({"conv": counts, "fc": counts | {("a", "b"): 1}}, ("a", "b", "c"))
    model = Chain(("a", "b", "c"))

    def choice(**options):
        return choose(match(cmap, model), model, Selection(layers=["conv"]), ("a", "b", "c"), **options)

    assert choice().covered == 9 / 13
    assert choice(groups=[["a", "c"], ["b"]]).covered == 7 / 13
    assert str(choice()) == "1 of 2 shared layers: named"


def test_the_plan_of_a_saved_model(tmp_path):
    model, plan = Chain(), BranchPlan.per_task(["norm", "fc"], TASKS)
    recon.save(recon.convert(model, plan, INPUTS), tmp_path / "branched")
    assert load_plan(tmp_path / "branched").layers == plan.layers
    recon.save(model, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds a plain model, which has no plan"):
        load_plan(tmp_path / "plain")
