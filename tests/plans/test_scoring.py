from recon.branching.partition import Partition
from recon.plans.grouping import conflict_graph
from recon.plans.scoring import Scoring
from tests.maps.test_conflict_map import make_map, score_map
from tests.plans.test_grouping import TASKS, drawn_map, pair_map, within


def parted(cmap, split, threshold=None):
    tasks = next(iter(split.values())).tasks
    return Scoring(cmap, tasks, threshold).parted(split)


def test_conflicts_within_a_group_are_not_parted():
    cmap = drawn_map(2, TASKS)
    halves = Partition.of_groups([["a", "b", "c"], ["d", "e", "f"]], TASKS)
    found = parted(cmap, dict.fromkeys(cmap.scores(), halves))
    for layer in cmap.layers:
        graph = conflict_graph(cmap, TASKS, [layer.name])
        assert found[layer.name] == cmap.scores()[layer.name] - within(graph, halves)
    per_task = dict.fromkeys(cmap.scores(), Partition.per_task(TASKS))
    assert parted(cmap, per_task) == cmap.scores()


def test_a_model_of_some_of_the_maps_tasks_parts_what_its_own_conflict():
    counts = {("a", "b"): 12, ("a", "c"): 30, ("b", "c"): 18, ("c", "d"): 40}
    cmap = pair_map({"x": counts}, tuple("abcd"))
    split = Partition.of_groups([["a", "b"], ["c"]], ("a", "b", "c"))
    assert parted(cmap, {"x": split}) == {"x": 48}


def test_at_another_threshold_conflicts_are_parted_in_the_same_proportion():
    cmap = make_map(tasks=("a", "b", "c"))
    split = dict.fromkeys(cmap.scores(), Partition.of_groups([["a", "b"], ["c"]], ("a", "b", "c")))
    own, other = parted(cmap, split), parted(cmap, split, -0.5)
    for name, score in cmap.scores(-0.5).items():
        assert other[name] == round(score * own[name] / cmap.scores()[name])


def test_a_map_without_pairs_parts_everything():
    cmap = score_map({"x": 7}, tasks=TASKS)
    assert parted(cmap, {"x": Partition.of_groups([["a", "b", "c"], ["d", "e", "f"]], TASKS)}) == {"x": 7}
