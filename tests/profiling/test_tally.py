"""The tally against plain loops over the cosines of random gradients."""

from itertools import combinations

import numpy as np
import pytest
import torch

from recon.maps.conflict_map import ConflictMap
from recon.profiling.counted_map import counted_map
from recon.profiling.tally import Tally
from recon.support.network.layers import Layer
from tests.maps.from_cosines import THRESHOLDS, floor_of

TASKS = ("a", "b", "c", "d")
PAIRS = list(combinations(range(4), 2))
LAYERS = {0: "stem", 2: "conv", 3: "fc"}  # layer 1 is not shared
# The numbers of a step's tasks, in the order of its losses; the first step knows two tasks alone.
STEPS_OF = [(1, 0), (0, 1, 2, 3), (3, 1), (2, 0, 3), (0,)]


def cosine(one, other):
    """NaN where one is zero."""
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return np.clip(one @ other / norms, -1, 1) if norms > 0 else np.nan


class Run:
    """Gradients of random steps, given to a tally and compared by plain loops.

    In layer 3 task 2 has none; every seventh step is not finite; a step has the layers of its number's parity.
    """

    def __init__(self, steps, seed=0, dtype=torch.float64):
        rng = np.random.default_rng(seed)
        self.tally = Tally(4, -0.1, torch.device("cpu"))
        self.cosines = {layer: np.full((steps, len(PAIRS)), np.nan) for layer in LAYERS}
        self.own = {layer: np.full((steps, 4), np.nan) for layer in LAYERS}
        self.across = {layer: np.full((steps, 2, len(PAIRS)), np.nan) for layer in LAYERS}
        self.steps, self.skipped = steps, 0
        for step in range(steps):
            tasks = STEPS_OF[step % len(STEPS_OF)]
            layers = list(LAYERS) if step % 2 else [2, 0]
            first, second = rng.standard_normal((2, len(layers), len(tasks), 3))
            for gradients in (first, second):
                for row in (row for row, layer in enumerate(layers) if layer == 3):
                    gradients[row, [task == 2 for task in tasks]] = 0
            finite = step % 7 != 6
            self.skipped += not finite
            if finite:
                self.compare(step, layers, tasks, first, second)
            self.add(layers, tasks, torch.tensor(first, dtype=dtype), torch.tensor(second, dtype=dtype), finite)

    def compare(self, step, layers, tasks, first, second):
        for row, layer in enumerate(layers):
            at = dict(zip(tasks, zip(first[row], second[row], strict=True), strict=True))
            for task, (one, other) in at.items():
                self.own[layer][step, task] = cosine(one, other)
            for n, (i, j) in enumerate(PAIRS):
                if i in at and j in at:
                    self.cosines[layer][step, n] = cosine(at[i][0], at[j][0])
                    self.across[layer][step, :, n] = cosine(at[i][0], at[j][1]), cosine(at[j][0], at[i][1])

    def add(self, layers, tasks, first, second, finite):
        gramians, products = first @ first.mT, first @ second.mT
        if not finite:
            gramians[-1, 0, 0] = products[0, -1, 0] = float("nan")
        self.tally.add(layers, tasks, gramians)
        self.tally.add_floor(layers, tasks, products, first.norm(dim=-1), second.norm(dim=-1))

    def map(self):
        layers = {number: Layer(name, "Linear", {}) for number, name in LAYERS.items()}
        return counted_map(self.tally, layers, TASKS, {"problem": "toy"})


def check(run, cmap):
    below = np.array(THRESHOLDS).reshape(-1, 1, 1)
    assert (cmap.thresholds, cmap.steps, cmap.skipped) == (THRESHOLDS, run.steps, run.skipped)
    width = cmap.pair_bin_steps
    starts = range(0, run.steps, width)
    seen = np.max([np.isfinite(values) for values in run.cosines.values()], axis=0)
    assert (cmap.met <= [seen[start : start + width].sum(axis=0) for start in starts]).all()
    for layer, values, own, across in zip(
        cmap.layers, run.cosines.values(), run.own.values(), run.across.values(), strict=True
    ):
        assert np.array_equal(layer.observed.sum(axis=0), np.isfinite(values).sum(axis=0))
        assert np.array_equal(layer.below, (values < below).sum(axis=1))
        assert np.array_equal(layer.conflicts.sum(axis=0), (values < -0.1).sum(axis=0))
        assert np.array_equal(
            layer.pair_series, [(values[start : start + width] < -0.1).sum(axis=0) for start in starts]
        )
        for key, counts in vars(floor_of(own, across)).items():
            assert np.array_equal(getattr(layer.floor, key), counts), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [3, 64, 150])
def test_counts_by_pair_over_time_and_around_s(steps, dtype, tmp_path):
    run = Run(steps, dtype=dtype)
    cmap = run.map()
    assert cmap.pair_bin_steps == {3: 1, 64: 1, 150: 4}[steps]
    check(run, cmap)
    cmap.save(tmp_path / "map.json")
    check(run, ConflictMap.load(tmp_path / "map.json"))


def test_a_tally_goes_on_where_it_was():
    whole, first = Run(50), Run(50)
    state = first.tally.state_dict()
    first.tally = Tally(4, -0.1, torch.device("cpu"))
    first.tally.load_state_dict(
        {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
    )
    check(whole, first.map())


def test_a_profile_from_before_goes_on_without_the_counts_that_it_lacks(tmp_path):
    run = Run(50)
    state = run.tally.state_dict()
    run.tally = Tally(4, -0.1, torch.device("cpu"))
    run.tally.load_state_dict({key: value for key, value in state.items() if key not in ("below", "floor")})
    gradients = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    run.tally.add(list(LAYERS), range(4), gradients)
    cmap = run.map()
    assert all(layer.below is None and layer.floor is None for layer in cmap.layers) and cmap.steps == 51
    assert cmap.observed()["conv"]["a", "b"] == np.isfinite(run.cosines[2][:, 0]).sum() + 1
    cmap.save(tmp_path / "map.json")
    assert ConflictMap.load(tmp_path / "map.json").scores(by="rate") == cmap.scores(by="rate")


def test_a_map_of_40_tasks_and_62_layers_takes_a_few_mb(tmp_path):
    """After as many steps as fill the series, in which a third of the pairs conflict."""
    tally, tasks = Tally(62, -0.1, torch.device("cpu")), [f"task{number}" for number in range(40)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(96):
        gradients = torch.randn(62, 40, 8, generator=generator)
        tally.add(range(62), range(40), gradients @ gradients.mT)
    other = torch.randn(62, 40, 8, generator=generator)
    tally.add_floor(range(62), range(40), gradients @ other.mT, gradients.norm(dim=-1), other.norm(dim=-1))
    layers = {number: Layer(f"layer{number}", "Conv2d", {}) for number in range(62)}
    cmap = counted_map(tally, layers, tasks, {})
    assert len(cmap.met) >= 8  # enough to see noise in each quarter
    cmap.save(tmp_path / "map.json")
    assert (tmp_path / "map.json").stat().st_size < 6e6
