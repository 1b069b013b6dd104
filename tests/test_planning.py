import logging

import pytest
from torch import nn

import recon
from recon.errors import MapMismatchError, PlanError, UnknownNameError
from recon.partition import Partition
from recon.planning import BranchPlan
from tests.test_conflict_map import make_map

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
    with pytest.raises(PlanError, match="one of the two"):
        recon.plan(make_map(), net(), **choice)


def test_an_unknown_selector():
    with pytest.raises(PlanError, match="Choose 'top' or 'random'"):
        recon.plan(make_map(), net(), top_k=1, select="best")


def test_an_unknown_layer_gets_the_nearest_names():
    with pytest.raises(UnknownNameError, match=r"no layer named 'norn'. Did you mean 'norm'"):
        recon.plan(make_map(), net(), layers=["norn"])


def test_a_map_of_another_architecture():
    with pytest.raises(MapMismatchError, match=r"3 of its 3 layers .*head1"):
        recon.plan(make_map(), nn.ModuleDict({"head1": nn.Linear(3, 2)}), top_k=1)


def test_a_map_whose_every_shape_differs():
    with pytest.raises(MapMismatchError, match="other shapes"):
        recon.plan(make_map(), net(conv=(4, 2), norm=(4, 2), fc=(4, 2)), top_k=1)


def test_a_map_with_another_stem_serves_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        recon.plan(make_map(), net(conv=(4, 2)), top_k=1)
    assert "1 layers have other shapes" in caplog.text


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
