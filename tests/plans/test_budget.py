from itertools import combinations

import numpy as np
import pytest
import torch

from recon.branching.partition import Partition
from recon.errors import FanError, PlanError
from recon.plans.budget import Budget, Chooser, _steps
from recon.plans.costing.cost_model import CostModel
from tests.cost_double import TASKS, chain, random_dag
from tests.zoo import ZOO

PER_TASK = Partition.per_task(TASKS)
COARSE = Partition.of_groups([["a", "b"], ["c"]], TASKS)


def worth(values, names):
    return sum(values[name] for name in names)


def best_by_enumeration(costs, partitions, values, budget):
    """The most conflict of any subset of the layers that fits."""
    subsets = (names for k in range(len(values) + 1) for names in combinations(values, k))
    fitting = [names for names in subsets if budget.allows(costs.of({name: partitions[name] for name in names}))]
    return max(worth(values, names) for names in fitting)


def best_prefix(costs, partitions, values, budget):
    ranking = sorted(values, key=lambda name: -values[name])
    prefixes = [ranking[:k] for k in range(len(ranking) + 1)]
    return max(worth(values, p) for p in prefixes if budget.allows(costs.of({name: partitions[name] for name in p})))


def drawn(rng, costs, count=8, partitions=(PER_TASK,)):
    names = [name for name in costs.layers if name.startswith("l")][:count]
    split = {name: partitions[rng.integers(len(partitions))] for name in names}
    return split, {name: int(rng.integers(1, 50)) for name in names}


BUDGETS = [
    Budget(max_macs=1.1),
    Budget(max_macs=1.25),
    Budget(max_params=1.3),
    Budget(max_params=1.6, max_macs=1.5),
    Budget(max_params=2.5, max_macs=1.2),
]


@pytest.mark.parametrize("kind", ["chain", "dag"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_subsets(kind, nested, seed):
    rng = np.random.default_rng(seed)
    costs = chain(rng.integers(1, 100, size=(8, 2)).tolist()) if kind == "chain" else random_dag(rng)
    partitions, values = drawn(rng, costs, partitions=(PER_TASK, COARSE) if nested else (PER_TASK,))
    chooser = Chooser(costs, partitions, values)
    assert chooser.is_exact
    for budget in BUDGETS:
        best = best_by_enumeration(costs, partitions, values, budget)
        if not best:
            with pytest.raises(PlanError, match="No layer fits"):
                chooser.best(budget)
            continue
        names = chooser.best(budget)
        assert budget.allows(costs.of({name: partitions[name] for name in names}))
        assert worth(values, names) == best
        assert best >= best_prefix(costs, partitions, values, budget)


@pytest.mark.parametrize("name", ZOO)
def test_the_best_of_all_subsets_of_a_zoo_model(name):
    torch.manual_seed(0)
    model, rng = ZOO[name].make(), np.random.default_rng(0)
    costs = CostModel(model, TASKS, ZOO[name].inputs(2))
    layers = [layer for layer in costs.layers if "heads" not in layer][:7]
    partitions = {layer: (PER_TASK, COARSE)[int(rng.integers(2))] for layer in layers}
    values = {layer: int(rng.integers(1, 50)) for layer in layers}
    chooser = Chooser(costs, partitions, values)
    subsets = [names for k in range(len(layers) + 1) for names in combinations(layers, k)]
    if not costs.traced:  # each of the costs is a dry run
        subsets = subsets[: len(layers) + 1]
    found = {names: costs.of({name: partitions[name] for name in names}) for names in subsets}
    for budget in BUDGETS:
        best = max(worth(values, names) for names in subsets if budget.allows(found[names]))
        if not best:
            with pytest.raises(PlanError, match="No layer fits"):
                chooser.best(budget)
            continue
        names = chooser.best(budget)
        assert budget.allows(costs.of({name: partitions[name] for name in names}))
        assert worth(values, names) == best if costs.traced else worth(values, names) >= best


@pytest.mark.parametrize("name", ["PlainConv", "ResidualNet", "UNet"])
def test_the_steps_that_a_plan_takes_add_up_to_its_cost(name):
    torch.manual_seed(0)
    costs = CostModel(ZOO[name].make(), TASKS, ZOO[name].inputs(2))
    layers = [layer for layer in costs.layers if "heads" not in layer][::2][:6]
    split = {layer: (PER_TASK, COARSE)[number % 2] for number, layer in enumerate(layers)}
    alone = np.array([costs.operation_macs({layer: split[layer]}) for layer in layers])
    steps = _steps(alone - np.array(costs.operation_macs({})))
    for names in (names for k in range(len(layers) + 1) for names in combinations(range(len(layers)), k)):
        taken = sum(macs for takers, macs in steps.items() if set(takers) & set(names))
        assert costs.of({}).macs + taken == costs.of({layers[i]: split[layers[i]] for i in names}).macs


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_thirty_layers(seed):
    """Parameters alone make a knapsack, which a table solves."""
    rng = np.random.default_rng(seed)
    sizes, values = rng.integers(50, 100, size=30).tolist(), rng.integers(50, 100, size=30).tolist()
    costs = chain([(size, 1) for size in sizes])
    room = 2 * sum(sizes) // 3  # two more copies of each chosen layer: a third of all of them
    best = np.zeros(room + 1, dtype=int)
    for size, value in zip(sizes, values, strict=True):
        best[2 * size :] = np.maximum(best[2 * size :], best[: -2 * size] + value)
    worths = {f"l{i}": value for i, value in enumerate(values)}
    budget = Budget(max_params=1 + (room + 0.5) / costs.of({}).parameters)
    names = Chooser(costs, dict.fromkeys(worths, PER_TASK), worths).best(budget)
    assert worth(worths, names) == best[-1]


def test_branching_below_a_fan_is_free_of_multiply_adds():
    # The first layer alone would triple everything. Whatever comes behind l2 costs parameters only.
    costs = chain([(10, 100), (10, 100), (10, 10), (500, 5), (10, 5)])
    values = {"l0": 90, "l1": 1, "l2": 5, "l3": 6, "l4": 7}
    chooser = Chooser(costs, dict.fromkeys(values, PER_TASK), values)
    assert chooser.best(Budget(max_macs=1.2)) == ["l2", "l3", "l4"]
    assert chooser.best(Budget(max_macs=1.2, max_params=1.2)) == ["l2", "l4"]  # l3 is half of the model
    assert chooser.best(Budget(max_params=1.2)) == ["l0", "l1", "l2", "l4"]


def test_a_plan_at_exactly_its_own_cost_fits():
    costs = chain([(10, 100), (7, 30), (3, 10)])
    values = {"l1": 3, "l2": 4}
    plan = {"l1": PER_TASK}
    ratio = costs.of(plan).macs_ratio
    assert Chooser(costs, dict.fromkeys(values, PER_TASK), values).best(Budget(max_macs=ratio)) == ["l1", "l2"]


def test_of_equal_plans_the_cheapest():
    costs = chain([(9, 100), (8, 10), (7, 10)])
    values = {"l0": 4, "l1": 4, "l2": 0}
    assert Chooser(costs, dict.fromkeys(values, PER_TASK), values).best(Budget(max_params=1.5)) == ["l1"]


def test_an_answer_that_the_cost_model_refuses_is_excluded():
    costs, truth = (chain([(10, 100), (10, 30), (10, 10), (10, 10)]) for _ in range(2))
    costs.operation_macs = lambda layers: [macs // 2 for macs in truth.operation_macs(layers)]  # less than the truth
    values = {"l0": 9, "l1": 7, "l2": 2, "l3": 3}
    partitions = dict.fromkeys(values, PER_TASK)
    for limit in (1.3, 1.7, 2.1):
        names = Chooser(costs, partitions, values).best(Budget(max_macs=limit))
        assert worth(values, names) == best_by_enumeration(truth, partitions, values, Budget(max_macs=limit))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("why", ["not traced", "partitions that cross"])
def test_without_a_program_never_worse_than_the_best_prefix(seed, why):
    rng = np.random.default_rng(seed)
    costs = random_dag(rng, layers=11)
    costs.traced = why != "not traced"
    crossing = (COARSE, Partition.of_groups([["a"], ["b", "c"]], TASKS))
    partitions, values = drawn(rng, costs, 11, (PER_TASK,) if why == "not traced" else crossing)
    chooser = Chooser(costs, partitions, values)
    assert not chooser.is_exact
    for budget in BUDGETS:
        if best_prefix(costs, partitions, values, budget):
            names = chooser.best(budget)
            assert budget.allows(costs.of({name: partitions[name] for name in names}))
            assert worth(values, names) >= best_prefix(costs, partitions, values, budget)


def test_a_fill_takes_each_layer_that_still_fits():
    costs = chain([(10, 1), (50, 1), (5, 1), (5, 1)])  # with the heads, 85 parameters
    values = dict.fromkeys(["l0", "l1", "l2", "l3"], 1)
    chooser = Chooser(costs, dict.fromkeys(values, PER_TASK), values)
    assert chooser.fill(["l0", "l1", "l2", "l3"], Budget(max_params=1.4)) == ["l0", "l2"]
    assert chooser.fill(["l3", "l2", "l1", "l0"], Budget(max_params=1.4)) == ["l3", "l2"]


@pytest.mark.parametrize("limits", [{"max_params": 0.9}, {"max_macs": 0.99}, {"max_macs": float("nan")}])
def test_a_budget_below_one(limits):
    with pytest.raises(PlanError, match=f"{next(iter(limits))} is .* Give more than 1"):
        Budget(**limits)


def test_a_budget_without_a_limit():
    with pytest.raises(PlanError, match="no limit"):
        Budget()


def test_a_budget_that_no_layer_fits_names_the_cheapest():
    costs = chain([(10, 100), (20, 50), (15, 10)])  # the last: 30 of 60 more parameters, 20 of 175 more multiply-adds
    values = {"l0": 5, "l1": 5, "l2": 1}
    chooser = Chooser(costs, dict.fromkeys(values, PER_TASK), values)
    with pytest.raises(PlanError, match=r"No layer fits max_macs=1\.1\. .*'l2', .* 1\.5x the parameters and 1\.1143x"):
        chooser.best(Budget(max_macs=1.1))
    assert chooser.best(Budget(max_macs=1.1143)) == ["l2"]  # what the message says would do
    with pytest.raises(PlanError, match=r"No layer fits max_params=1\.2\. .*'l0', would need 1\.3334x"):
        chooser.best(Budget(max_params=1.2))


def test_a_layer_without_multiply_adds_behind_it():
    costs = chain([(10, 100), (10, 0)])
    assert Chooser(costs, {"l1": PER_TASK}, {"l1": 3}).best(Budget(max_macs=1)) == ["l1"]


@pytest.mark.parametrize("together", [False, True])
def test_layers_that_cannot_be_branched_are_left_out(together):
    costs = chain([(10, 100), (10, 50), (10, 10)])
    of, operation_macs = costs.of, costs.operation_macs

    def refuse(layers):
        if {"l1", "l2"} <= set(layers) if together else "l1" in layers:
            raise FanError("no")

    costs.of = lambda layers: refuse(layers) or of(layers)
    costs.operation_macs = lambda layers: refuse(layers) or operation_macs(layers)
    values = {"l0": 1, "l1": 9, "l2": 5}
    best = Chooser(costs, dict.fromkeys(values, PER_TASK), values).best(Budget(max_macs=9))
    assert best == (["l0", "l1"] if together else ["l0", "l2"])


def test_layers_without_a_conflict_are_no_plan():
    costs = chain([(10, 100), (10, 30)])
    with pytest.raises(PlanError, match="No layer that can be branched has a conflict"):
        Chooser(costs, {"l0": PER_TASK}, {"l0": 0}).best(Budget(max_macs=9))


def test_sixty_layers_in_well_under_a_second():
    rng = np.random.default_rng(0)
    costs = chain(rng.integers(1, 1000, size=(60, 2)).tolist())
    partitions, values = drawn(rng, costs, count=60)
    names = Chooser(costs, partitions, values).best(Budget(max_params=1.3, max_macs=1.5))
    assert best_prefix(costs, partitions, values, Budget(1.3, 1.5)) < worth(values, names)
