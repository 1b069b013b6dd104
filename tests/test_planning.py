import logging

import pytest
from torch import nn

import recon
from recon.branch_plan import BranchPlan
from recon.errors import MapMismatchError, PlanError, UnknownNameError, UsageError
from recon.matching import match
from recon.partition import Partition
from tests.test_conflict_map import make_map, score_map

TASKS = ("a", "b")


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


@pytest.mark.parametrize("choice", [{}, {"top_k": 1, "layers": ["conv"]}])
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
    with pytest.raises(UsageError, match=r"scores at S=-0\.02 alone"):
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
        ({"x": ["a", "b", "z"]}, "none of the tasks"),
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
