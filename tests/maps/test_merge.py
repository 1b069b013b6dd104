from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from recon.errors import MapMismatchError, UsageError
from recon.maps.conflict_map import ConflictMap
from tests.maps.from_cosines import THRESHOLDS, map_of, random_cosines, random_floors
from tests.maps.test_conflict_map import make_map, score_map, with_series

TASKS = ("a", "b", "c")


def three():
    maps = [make_map(tasks=TASKS, seed=seed, steps=20 + 20 * seed) for seed in range(3)]
    return [  # with a skipped step in each quarter of the second, two of the third
        replace(
            cmap,
            steps=cmap.steps + 4 * seed,
            skipped=4 * seed,
            stage_steps=tuple(steps + seed for steps in cmap.stage_steps),
        )
        for seed, cmap in enumerate(maps)
    ]


def test_everything_adds_up():
    maps = three()
    merged = ConflictMap.merge(maps)
    for threshold in (-0.9, -0.5, -0.1, 0.0):
        assert merged.scores(threshold) == {
            name: sum(cmap.scores(threshold)[name] for cmap in maps) for name in ("conv", "norm", "fc")
        }
    assert (merged.tasks, merged.threshold, merged.steps, merged.skipped) == (TASKS, -0.1, 20 + 44 + 68, 12)
    assert merged.stage_steps == (5 + 11 + 17,) * 4
    for number, layer in enumerate(merged.layers):
        for key in ("histogram", "conflicts", "observed"):
            expected = np.sum([getattr(cmap.layers[number], key) for cmap in maps], axis=0)
            assert np.array_equal(getattr(layer, key), expected)


def test_the_order_of_the_maps_and_of_merging_does_not_matter():
    one, two, other = three()
    sums = [ConflictMap.merge(maps).scores() for maps in ([one, two, other], [other, one, two])]
    sums.append(ConflictMap.merge([ConflictMap.merge([one, two]), other]).scores())
    assert sums[0] == sums[1] == sums[2]


def test_the_sources_stay_as_they_were():
    maps = three()
    before = [cmap.layers[0].histogram.copy() for cmap in maps]
    ConflictMap.merge(maps)
    assert all(
        np.array_equal(cmap.layers[0].histogram, histogram) for cmap, histogram in zip(maps, before, strict=True)
    )


def test_pairs_and_layers_in_another_order_are_brought_to_the_first_s():
    one, other = three()[:2]
    order = ("c", "a", "b")
    columns = [list(combinations(TASKS, 2)).index(tuple(sorted(pair))) for pair in combinations(order, 2)]
    shuffled = replace(
        other,
        tasks=order,
        layers=[
            replace(layer, conflicts=layer.conflicts[:, columns], observed=layer.observed[:, columns])
            for layer in other.layers[::-1]
        ],
    )
    expected, merged = ConflictMap.merge([one, other]), ConflictMap.merge([one, shuffled])
    assert (merged.tasks, [layer.name for layer in merged.layers]) == (TASKS, ["conv", "norm", "fc"])
    for layer, like in zip(merged.layers, expected.layers, strict=True):
        assert np.array_equal(layer.conflicts, like.conflicts) and np.array_equal(layer.observed, like.observed)


def test_a_merged_map_can_be_saved_and_has_no_series(tmp_path):
    merged = ConflictMap.merge([with_series(cmap) for cmap in three()])
    assert merged.bin_steps == 0 and all(layer.series is None for layer in merged.layers)
    merged.save(tmp_path / "map.json")
    loaded = ConflictMap.load(tmp_path / "map.json")
    assert loaded.scores() == merged.scores() and loaded.made_by == merged.made_by


def pair_maps(orders=(TASKS, TASKS), thresholds=(THRESHOLDS, THRESHOLDS), with_floors=(True, True)):
    """Two maps of the same layers from random cosines, with the cosines and floors that they were made of."""
    found = []
    for seed, (order, kept, with_floor) in enumerate(zip(orders, thresholds, with_floors, strict=True)):
        cosines = random_cosines(("conv", "fc"), order, 24, seed=seed)
        floors = random_floors(("conv", "fc"), order, 7, seed=10 + seed, thresholds=kept) if with_floor else None
        found.append(map_of(cosines, order, thresholds=kept, floors=floors))
    return found


def of_pair(counts, cmap, pair):
    """The column of a pair, in whatever order its map has."""
    pairs = [frozenset(of) for of in cmap.pairs]
    return counts[..., pairs.index(frozenset(pair))]


def test_counts_by_pair_and_floors_add_up_whatever_the_order_of_the_tasks(tmp_path):
    one, other = pair_maps(orders=(TASKS, ("c", "a", "b")))
    merged = ConflictMap.merge([one, other])
    assert (merged.thresholds, merged.met, merged.pair_bin_steps) == (THRESHOLDS, None, 0)
    for number, layer in enumerate(merged.layers):
        parts = one.layers[number], other.layers[number]
        for pair in merged.pairs:
            for get in (
                lambda of: of.below,
                lambda of: of.observed,
                lambda of: of.floor.across_observed,
                lambda of: of.floor.across_conflicts,
            ):
                expected = sum(of_pair(get(of), cmap, pair) for of, cmap in zip(parts, (one, other), strict=True))
                assert np.array_equal(of_pair(get(layer), merged, pair), expected)
        for task in TASKS:
            own = [of.floor.conflicts[:, cmap.tasks.index(task)] for of, cmap in zip(parts, (one, other), strict=True)]
            assert np.array_equal(layer.floor.conflicts[:, TASKS.index(task)], sum(own))
            assert layer.floor.observed[TASKS.index(task)] == 14
        assert layer.pair_series is None
    merged.save(tmp_path / "map.json")
    assert ConflictMap.load(tmp_path / "map.json").scores(by="excess") == merged.scores(by="excess")


def test_the_thresholds_of_both_are_kept():
    one, other = pair_maps(thresholds=((-0.3, -0.1, 0.0), (-0.2, -0.1, 0.0)))
    merged = ConflictMap.merge([one, other])
    assert merged.thresholds == (-0.1, 0.0)
    for layer, *parts in zip(merged.layers, one.layers, other.layers, strict=True):
        assert np.array_equal(layer.below, sum(of.below[1:] for of in parts))
        assert np.array_equal(layer.floor.conflicts, sum(of.floor.conflicts[1:] for of in parts))
    older = make_map(layers=("conv", "fc"), tasks=TASKS, seed=5)
    merged = ConflictMap.merge([one, older])
    assert merged.thresholds == (-0.1,)
    assert np.array_equal(merged.layers[0].below[0], merged.layers[0].conflicts.sum(axis=0))
    assert merged.scores(tasks=("a", "b"), by="rate") == ConflictMap.merge([older, one]).scores(
        tasks=("a", "b"), by="rate"
    )


def test_the_floor_is_that_of_the_runs_that_took_one():
    one, other = pair_maps(with_floors=(True, False))
    assert ConflictMap.merge([one, other]).floor() == ConflictMap.merge([other, one]).floor() == one.floor()


def test_units_of_other_layers_do_not_add_up():
    one, other = pair_maps()
    other.layers[0].members = ("conv.down", "conv.up")
    with pytest.raises(MapMismatchError, match="conv join other layers"):
        ConflictMap.merge([one, other])


def test_made_by_keeps_what_is_common_and_names_the_sources():
    maps = three()
    for seed, cmap in enumerate(maps):
        cmap.made_by = {"problem": "toy", "seed": seed}
    assert ConflictMap.merge(maps, ["x.json", "y.json", "z.json"]).made_by == {
        "problem": "toy",
        "merged": [{"map": "x.json", "seed": 0}, {"map": "y.json", "seed": 1}, {"map": "z.json", "seed": 2}],
    }


def test_maps_of_scores_add_up():
    merged = ConflictMap.merge([score_map({"x": 3, "y": 5}), score_map({"y": 1, "x": 4})])
    assert merged.scores() == {"x": 7, "y": 6}
    assert (merged.steps, merged.skipped, merged.stage_steps) == (None, None, ())
    with pytest.raises(UsageError, match=r"only its scores at S=-0\.1"):
        merged.scores(-0.2)


def reshaped(cmap):
    cmap.layers[1].shapes = {"weight": [9, 9]}
    return cmap


def without_pairs(cmap):
    return replace(cmap, layers=[replace(layer, conflicts=None, observed=None) for layer in cmap.layers])


@pytest.mark.parametrize(
    "other, message",
    [
        (make_map(tasks=("a", "b"), seed=1), "its tasks are a, b, the other's a, b, c"),
        (score_map({"conv": 1, "norm": 2, "fc": 3}), "its tasks are unknown, the other's a, b, c"),
        (make_map(tasks=TASKS, seed=1, threshold=-0.2), r"its threshold is -0\.2, the other's -0\.1"),
        (make_map(tasks=TASKS, seed=1, layers=("conv", "norm")), "it lacks fc. Merge maps of the same layers"),
        (make_map(tasks=TASKS, seed=1, layers=("conv", "norm", "fc", "x")), "it has x besides"),
        (make_map(tasks=TASKS, seed=1, layers=("conv", "norm", "x")), "it lacks fc and has x besides"),
        (reshaped(make_map(tasks=TASKS, seed=1)), "parameters of norm have other shapes"),
        (without_pairs(make_map(tasks=TASKS, seed=1)), "holds no counts by task pair"),
    ],
)
def test_maps_that_do_not_add_up(other, message):
    with pytest.raises(MapMismatchError, match=f"^two cannot be added to one: .*{message}"):
        ConflictMap.merge([make_map(tasks=TASKS), other], ["one", "two"])


def test_scores_alone_do_not_add_up_with_histograms():
    full = make_map(tasks=TASKS)
    for layer in full.layers:
        layer.shapes = {}
    with pytest.raises(MapMismatchError, match="holds no cosines"):
        ConflictMap.merge([full, score_map({"conv": 1, "norm": 2, "fc": 3}, tasks=TASKS)])


def test_the_same_map_twice_is_refused():
    one, two, _ = three()
    with pytest.raises(UsageError, match=r"map 1 and map 3 hold exactly the same counts.*different seeds"):
        ConflictMap.merge([one, two, make_map(tasks=TASKS, steps=20)])
    with pytest.raises(UsageError, match="exactly the same counts"):
        ConflictMap.merge([score_map({"x": 3}), score_map({"x": 3})])


def test_two_runs_without_any_conflict_may_be_merged():
    assert ConflictMap.merge([score_map({"x": 0}), score_map({"x": 0})]).scores() == {"x": 0}


@pytest.mark.parametrize("count", [0, 1])
def test_merging_takes_two(count):
    with pytest.raises(UsageError, match="two or more"):
        ConflictMap.merge(three()[:count])
