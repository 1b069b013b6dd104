"""Counts by pair in a map file: each is read back, and refused where it contradicts another."""

import json

import numpy as np
import pytest

from recon.errors import MapFileError
from recon.maps.conflict_map import ConflictMap
from tests.maps.from_cosines import THRESHOLDS, map_of, random_cosines, random_floors
from tests.maps.test_conflict_map import damaged

LAYERS, TASKS = ("conv", "fc"), ("a", "b", "c")


def full(steps=22, width=3):
    cosines = random_cosines(LAYERS, TASKS, steps, seed=8)
    cmap = map_of(cosines, TASKS, bin_steps=2, pair_bin_steps=width, floors=random_floors(LAYERS[:1], TASKS, 6))
    cmap.layers[1].members = ("fc.down", "fc.up")
    return cmap


def test_everything_is_read_back(tmp_path):
    cmap = full()
    cmap.save(tmp_path / "map.json")
    loaded = ConflictMap.load(tmp_path / "map.json")
    assert (loaded.thresholds, loaded.pair_bin_steps) == (THRESHOLDS, 3) and np.array_equal(loaded.met, cmap.met)
    for one, other in zip(loaded.layers, cmap.layers, strict=True):
        assert one.members == other.members
        assert np.array_equal(one.below, other.below) and np.array_equal(one.pair_series, other.pair_series)
        assert (one.floor is None) == (other.floor is None)
        for key in vars(other.floor) if other.floor else ():
            assert np.array_equal(getattr(one.floor, key), getattr(other.floor, key))
    assert loaded.scores(by="excess") == cmap.scores(by="excess")
    assert loaded.intervals(by="rate") == cmap.intervals(by="rate")


def test_an_older_file_has_none_of_it(tmp_path):
    def older(d):
        d["version"] = 2
        for key in ("thresholds", "pair_bin_steps", "met"):
            del d[key]
        for layer in d["layers"]:
            for key in ("below", "pair_series", "members", "floor"):
                del layer[key]

    cmap = ConflictMap.load(damaged(tmp_path, older, full()))
    assert (cmap.thresholds, cmap.pair_bin_steps, cmap.met) == ((), 0, None) and not cmap.has_floor
    assert cmap.scores(by="rate") == full().scores(by="rate") and cmap.intervals() == full().intervals()


def set_in(key, value):
    return lambda d: d["layers"][0].update({key: value})


def set_floor(key, value):
    return lambda d: d["layers"][0]["floor"].update({key: value})


def swap_thresholds(d):
    for layer in d["layers"]:
        layer["below"][0], layer["below"][5] = layer["below"][5], layer["below"][0]


def move_between_pairs(d):
    """As many below each threshold, of other pairs."""
    d["layers"][0]["below"] = [[none, other, one] for none, one, other in d["layers"][0]["below"]]


def move_at_s(d):
    """As many below each, of other pairs; still nested, and not more than observed."""
    rows = d["layers"][0]["below"]
    for row in rows:
        row[1:] = row[1] + 1, row[2] - 1


WRONG = {
    "no thresholds": (lambda d: d.pop("thresholds"), "'thresholds' is missing"),
    "thresholds of another type": (lambda d: d.update(thresholds=["x"]), "'thresholds' is not a list of thresholds"),
    "a threshold of truth": (lambda d: d["thresholds"].__setitem__(5, False), "'thresholds' is not a list of"),
    "a huge threshold": (lambda d: d["thresholds"].__setitem__(0, -(10**400)), "'thresholds' is not a list of"),
    "a threshold off the grid": (lambda d: d["thresholds"].__setitem__(0, -0.305), "'thresholds': Threshold -0.305"),
    "falling thresholds": (lambda d: d.update(thresholds=d["thresholds"][::-1]), "'thresholds' is not in rising order"),
    "a threshold twice": (lambda d: d["thresholds"].__setitem__(0, -0.2), "'thresholds' is not in rising order"),
    "without S": (lambda d: d["thresholds"].__setitem__(3, -0.11), "'thresholds' lacks the map's own threshold"),
    "one more threshold": (lambda d: d["thresholds"].insert(0, -0.4), r"'layers\[0\].below' is not an array"),
    "below in one layer alone": (set_in("below", None), r"'layers\[1\].below' is known here and not"),
    "below of no counts": (set_in("below", [[0.5] * 3] * 6), r"'layers\[0\].below' is not an array of counts"),
    "not nested": (swap_thresholds, r"'layers\[0\].below' counts more cosines below a threshold than below a higher"),
    "other pairs": (move_between_pairs, r"'layers\[0\].below' counts more cosines below a threshold than were"),
    "other pairs at S": (move_at_s, r"'layers\[0\].below' has other counts at the map's own threshold"),
    "members of another type": (set_in("members", "fc"), r"'layers\[0\].members' has the wrong type"),
    "a member twice": (set_in("members", ["x", "x"]), r"'layers\[0\].members' names 'x' twice"),
    "a floor of another type": (set_in("floor", []), r"'layers\[0\].floor' has the wrong type"),
    "a floor without counts": (set_in("floor", {}), r"'layers\[0\].floor.observed' is missing"),
    "a floor of two tasks": (set_floor("observed", [6, 6]), r"'layers\[0\].floor.observed' is not an array"),
    "negative floor": (set_floor("observed", [6, 6, -1]), r"'layers\[0\].floor.observed' is not an array"),
    "a floor that saw nothing": (
        set_floor("observed", [6, 0, 6]),
        r"'layers\[0\].floor.conflicts' counts more cosines below a threshold than were observed",
    ),
    "across that saw nothing": (
        set_floor("across_observed", [0, 0, 0]),
        r"'layers\[0\].floor.across_conflicts' counts more cosines below a threshold than were observed",
    ),
    "a floor that is not nested": (
        lambda d: d["layers"][0]["floor"]["conflicts"].reverse(),
        r"'layers\[0\].floor.conflicts' counts more cosines below a threshold than below a higher",
    ),
    "no met": (lambda d: d.update(met=None), "'met' and 'pair_bin_steps' go with the layers' 'pair_series'"),
    "no width": (lambda d: d.update(pair_bin_steps=0), "'met' and 'pair_bin_steps' go with"),
    "a negative width": (lambda d: d.update(pair_bin_steps=-1), "'pair_bin_steps' is -1"),
    "another width": (lambda d: d.update(pair_bin_steps=2), "'met' has 8 bins of 2 steps, which does not fit 22"),
    "another length": (lambda d: d["met"].pop(), "'met' has 7 bins of 3 steps, which does not fit 22 steps"),
    "a pair too few": (lambda d: d["met"][0].pop(), "'met' is not an array of counts"),
    "met too often": (lambda d: d["met"][1].__setitem__(2, 4), "'met' counts more than 3 steps in a bin"),
    "a series in one layer alone": (set_in("pair_series", None), r"'layers\[1\].pair_series' is known here and not"),
    "a shorter series": (
        lambda d: d["layers"][1]["pair_series"].pop(),
        r"'layers\[1\].pair_series' has 7 bins, but 'met' has 8",
    ),
    "a series of other sums": (
        lambda d: d["layers"][1]["pair_series"][0].__setitem__(0, 1),
        r"'layers\[1\].pair_series' does not add up to the conflicts of each pair",
    ),
    "no conflicts": (
        lambda d: [layer.update(conflicts=None, observed=None) for layer in d["layers"]],
        r"'layers\[0\].conflicts' is missing, though other counts by task pair are there",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(tmp_path, name):
    change, words = WRONG[name]
    path = damaged(tmp_path, change, full())
    with pytest.raises(MapFileError, match=words) as error:
        ConflictMap.load(path)
    assert str(path) in str(error.value)


def test_conflicts_of_a_pair_that_did_not_meet(tmp_path):
    def move(d):
        """To a bin in which it conflicted as often as it met, from another."""
        series, met = d["layers"][0]["pair_series"], d["met"]
        full = next(n for n in range(8) if series[n][2] == met[n][2])
        other = next(n for n in range(8) if n != full and series[n][2] > 0)
        series[full][2] += 1
        series[other][2] -= 1

    with pytest.raises(MapFileError, match=r"'layers\[0\].pair_series' counts conflicts of a pair in steps in which"):
        ConflictMap.load(damaged(tmp_path, move, full()))


def test_more_bins_than_a_file_has_room_for(tmp_path):
    def longer(d):
        d["pair_bin_steps"], d["bin_steps"] = 1, 2
        d["met"] = [[1, 1, 1]] * 600

    with pytest.raises(MapFileError, match="'met' has 600 bins, more than a map of this size has"):
        ConflictMap.load(damaged(tmp_path, longer, full()))


def test_one_wrong_count_is_seen_wherever_it_is(tmp_path):
    """Each count by pair, one more: none passes, but for what only bounds hold, where all are filled."""
    path = tmp_path / "map.json"
    full().save(path)
    text = path.read_text()
    for key in ("below", "pair_series"):
        size = np.array(json.loads(text)["layers"][0][key]).size
        for place in np.random.default_rng(0).choice(size, size=12, replace=False):
            document = json.loads(text)
            values = np.array(document["layers"][0][key])
            values.flat[place] += 1
            document["layers"][0][key] = values.tolist()
            path.write_text(json.dumps(document))
            with pytest.raises(MapFileError, match=r"layers\[0\]"):
                ConflictMap.load(path)
