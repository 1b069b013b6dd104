"""Plans from maps whose layers are units: a unit is branched by all the layers that it joins."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

import recon
from recon.branching.partition import Partition
from recon.errors import MapMismatchError, PlanError, UnknownNameError, UsageError
from recon.plans.budget import Chooser
from recon.plans.matching import match, narrowed
from recon.plans.planning import choose
from recon.plans.selection import Selection
from tests import zoo
from tests.cost_double import TASKS, chain, random_dag
from tests.maps.test_conflict_map import make_map, with_series
from tests.plans.test_budget import BUDGETS, COARSE, PER_TASK, worth
from tests.plans.test_matching import net
from tests.plans.test_planning import net as flat_net

NAMES = ("stem", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
UNITS = {"layer1.0": ("layer1.0.conv1", "layer1.0.conv2"), "layer2.0": ("layer2.0.conv1", "layer2.0.conv2")}


def units_map(members=UNITS, plain=("stem",), seed=0, tasks=("a", "b")):
    """A map as a profile of `net(NAMES)` with units would make it."""
    cmap = make_map(layers=(*plain, *members), tasks=tasks, seed=seed)
    for layer in cmap.layers:
        layer.members = tuple(members.get(layer.name, ()))
        names = [name.removeprefix(f"{layer.name}.") for name in layer.members]
        layer.shapes = {f"{name}.weight": [2, 3] for name in names} or layer.shapes
    return cmap


def scored(scores, members=UNITS):
    """A units map with these scores."""
    cmap = units_map(members, [name for name in scores if name not in members])
    for layer in cmap.layers:
        layer.histogram = np.zeros_like(layer.histogram)
        layer.histogram[0] = scores[layer.name]
        layer.conflicts = np.array([[scores[layer.name]], [0], [0], [0]])
    return cmap


# Matching.


def test_a_unit_is_found_by_its_members():
    found = match(units_map(), net(NAMES))
    assert (found.matched, found.missing, found.changed) == (("stem", "layer1.0", "layer2.0"), (), ())
    assert found.units == UNITS
    assert found.expand(["layer2.0", "stem"]) == ["layer2.0.conv1", "layer2.0.conv2", "stem"]
    assert found.members("layer1.0.conv1") == ("layer1.0.conv1",)


def test_a_unit_of_which_the_model_lacks_a_part_is_missing():
    found = match(units_map(), net(NAMES[:-1]))
    assert found.matched == ("stem", "layer1.0") and found.missing == ("layer2.0",)
    with pytest.raises(MapMismatchError, match="another architecture"):
        match(units_map(plain=()), net(("stem",)))


def test_a_unit_is_found_under_another_prefix():
    found = match(units_map(), net([f"net.{name}" for name in NAMES]), rename={"": "net"})
    assert found.units == {f"net.{unit}": tuple(f"net.{m}" for m in members) for unit, members in UNITS.items()}
    assert found.changed == ()


def test_the_hint_for_a_unit_speaks_of_its_members():
    found = match(units_map(), net(["stem", *(f"net.{name}" for name in NAMES[1:])]))
    assert found.missing == ("layer1.0", "layer2.0")
    assert "'': 'net'" in match(units_map(plain=("head",)), net(["head", *(f"net.{n}" for n in NAMES[1:])])).hint


def test_a_unit_with_other_shapes_in_the_model_is_changed():
    assert match(units_map(), net(NAMES, **{"layer1.0.conv2": 7})).changed == ("layer1.0",)


def test_two_units_that_hold_one_layer_are_refused():
    twice = {"one": NAMES[1:3], "two": NAMES[2:4]}
    with pytest.raises(
        MapMismatchError, match=r"one of them 'two', are the same layer of this model, 'layer1\.0\.conv2'"
    ):
        match(units_map(twice), net(NAMES))


# Some of the layers, and units made of a map without.


def test_a_match_is_narrowed_by_names():
    found = match(make_map(layers=NAMES), net(NAMES, stem=7))
    assert narrowed(found, layers=r"layer.*", exclude=r".*conv2").matched == NAMES[1::2]
    assert narrowed(found, layers=["stem", "layer2.0.conv1"]).changed == ("stem",)
    assert narrowed(found, exclude="stem").changed == ()
    with pytest.raises(UnknownNameError, match="Did you mean 'stem'"):
        narrowed(found, layers="stemm")
    with pytest.raises(UsageError, match="leaves none"):
        narrowed(found, exclude=".*")


def test_a_unit_made_of_layers_has_their_conflicts_together():
    cmap = with_series(make_map(layers=NAMES, tasks=("a", "b", "c")))
    found = narrowed(match(cmap, net(NAMES, **{"layer1.0.conv2": 7})), units=r"layer\d\.\d")
    assert found.units == UNITS and found.changed == ("layer1.0",)
    for threshold in (None, -0.5):
        scores, parts = found.cmap.scores(threshold), cmap.scores(threshold)
        assert list(scores) == ["stem", *UNITS] and scores["stem"] == parts["stem"]
        assert all(scores[unit] == sum(parts[m] for m in members) for unit, members in UNITS.items())
    for unit, members in UNITS.items():
        pairs, parts = found.cmap.pair_scores()[unit], cmap.pair_scores()
        assert pairs == {pair: sum(parts[m][pair] for m in members) for pair in cmap.pairs}
        mean = np.mean([cmap.scores(by="rate")[m] for m in members])  # all were seen alike
        np.testing.assert_allclose(found.cmap.scores(by="rate")[unit], mean, rtol=1e-12)
    assert found.cmap.series().sum() == cmap.series().sum()
    assert {layer.name: layer.kind for layer in found.cmap.layers}["layer1.0"] == "2 Conv2d"


def test_units_of_a_map_can_be_joined_further():
    found = narrowed(match(units_map(), net(NAMES)), units="(?P<unit>layer).*")
    assert found.units == {"layer": NAMES[1:]} and found.cmap.layers[1].kind == "4 layers"


# Selectors.


def test_a_plan_from_units_names_their_layers():
    cmap = scored({"stem": 3, "layer1.0": 9, "layer2.0": 6})
    plan = recon.plan(cmap, net(NAMES), top_k=1)
    assert list(plan.layers) == list(UNITS["layer1.0"])
    choice = choose(match(cmap, net(NAMES)), net(NAMES), Selection(top_k=2), ("a", "b"))
    assert list(choice.plan.layers) == list(NAMES[1:])
    assert choice.covered == pytest.approx(15 / 18)
    assert str(choice).startswith("2 of 3 shared layers")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"share": 0.8}, NAMES[1:]),
        ({"layers": ["layer2.0"]}, UNITS["layer2.0"]),
        ({"layers": r"layer\d\.0"}, NAMES[1:]),
        ({"layers": ["layer2.0.conv2", "stem"]}, ("stem", "layer2.0.conv2")),
        ({"top_k": 1, "select": "last"}, UNITS["layer2.0"]),
        ({"like": recon.BranchPlan.per_task(["layer1.0.conv2"], ("a", "b")), "select": "random"}, ("stem",)),
        ({"like": recon.BranchPlan.per_task(NAMES[:2], ("a", "b")), "select": "last"}, UNITS["layer2.0"]),
    ],
    ids=["share", "name", "regex", "parts", "last", "like-one", "like-two"],
)
def test_every_selector_takes_a_unit_whole(how, expected):
    cmap = scored({"stem": 3, "layer1.0": 9, "layer2.0": 6})
    assert list(recon.plan(cmap, net(NAMES), **how).layers) == list(expected)


def test_a_layer_named_beside_its_unit_is_named_twice():
    with pytest.raises(PlanError, match=r"names layer1\.0\.conv1 twice"):
        recon.plan(units_map(), net(NAMES), layers=["layer1.0", "layer1.0.conv1"])


def test_a_unit_is_a_norm_if_all_its_layers_are():
    norms = {"norms": ("conv", "fc"), "mixed": ("norm", "other")}
    model = flat_net(other=(3, 2))
    for name in ("conv", "norm", "fc"):
        model[name].__class__ = type("SomeNorm", (torch.nn.Linear,), {})
    assert list(recon.plan(units_map(norms, ()), model, select="norms").layers) == ["conv", "fc"]


def test_each_layer_of_a_unit_is_split_as_the_unit():
    tasks = ("a", "b", "c")
    plan = recon.plan(units_map(tasks=tasks), net(NAMES), top_k=3, groups=[["a", "b"], "c"])
    assert set(plan.layers.values()) == {Partition.of_groups([["a", "b"], "c"], tasks)} and len(plan.layers) == 5


@pytest.mark.parametrize("kind", ["chain", "dag"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_units_within_a_budget_are_the_best_of_all_subsets(kind, seed):
    rng = np.random.default_rng(seed)
    costs = chain(rng.integers(1, 100, size=(8, 2)).tolist()) if kind == "chain" else random_dag(rng)
    layers = [name for name in costs.layers if name.startswith("l")][:8]
    members = {"u": layers[1:3], "v": [layers[0], layers[5]], "w": layers[6:]}  # side by side, and apart
    values = {name: int(rng.integers(1, 50)) for name in ["u", "v", "w", *layers[3:5]]}
    split = {name: (PER_TASK, COARSE)[int(rng.integers(2))] for name in values}
    chooser = Chooser(costs, split, values, members)

    def cost(names):
        return costs.of({layer: split[name] for name in names for layer in members.get(name, [name])})

    subsets = [names for k in range(len(values) + 1) for names in combinations(values, k)]
    found = 0
    for budget in BUDGETS:
        best = max(worth(values, names) for names in subsets if budget.allows(cost(names)))
        if best:
            names = chooser.best(budget)
            assert budget.allows(cost(names)) and worth(values, names) == best
            found += 1
    assert found


# From the profile to the branched model.


@pytest.mark.parametrize(
    ("name", "units"),
    [("ResidualNet", r"blocks\.\d"), ("Attention", "first|attention"), ("TransformerEncoder", r"layers\.\d")],
)
def test_a_profiled_unit_is_branched_and_verified(name, units):
    torch.manual_seed(0)
    model, x = zoo.ZOO[name].make(), zoo.ZOO[name].inputs(4)
    profiler = recon.Profiler(model, units=units, exclude="heads.*")
    for _ in range(3):
        out = model(x)
        profiler.backward({task: (out[task] - number).square().mean() for number, task in enumerate(TASKS)})
    cmap = profiler.conflict_map()
    (unit, *_) = [layer for layer in cmap.layers if layer.members]
    plan = recon.plan(replace(cmap, layers=[unit]), model, top_k=1)
    assert tuple(plan.layers) == unit.members
    branched = recon.convert(model, plan, x)
    recon.verify(model, branched, x)  # raises if a task's output is not that of the original with its copies
    copies = {name.partition(".branches.")[0] for name, _ in branched.named_parameters() if ".branches." in name}
    assert copies == set(unit.members)


def test_comparing_maps_names_the_units_that_join_other_layers():
    other = units_map({**UNITS, "layer2.0": ("layer2.0.conv2",)}, seed=1)
    assert units_map().compare(other).regrouped == ("layer2.0",)
    assert units_map().compare(units_map(seed=1)).regrouped == ()
    under = units_map(
        {f"net.{unit}": tuple(f"net.{m}" for m in of) for unit, of in UNITS.items()}, ("net.stem",), seed=1
    )
    assert units_map().compare(under, rename={"net": ""}).regrouped == ()


def test_units_survive_the_file(tmp_path):
    units_map().save(tmp_path / "map.json")
    assert match(recon.ConflictMap.load(tmp_path / "map.json"), net(NAMES)).units == UNITS
