"""The picture of a branched network: lanes and marks are counted on what matplotlib was given to draw."""

from collections import Counter

import pytest
import torch
from torch import nn

from recon.branching.partition import Partition
from recon.errors import UsageError
from recon.models import ResNet18, SmallResNet
from recon.plans.costing.cost_model import CostModel
from recon.plans.pictures.network_layout import network_layout
from recon.plans.pictures.network_picture import draw_network, network_figure

FORTY = tuple(f"attribute_{number}" for number in range(40))
LATE = ("blocks.2.conv1", "blocks.2.bn1")


def costs_of(model, tasks, size=12):
    return CostModel(model, tasks, torch.randn(2, 1, size, size))


@pytest.fixture(scope="module")
def small():
    return costs_of(SmallResNet({"a": 4, "b": 4}), ("a", "b"))


@pytest.fixture(scope="module")
def forty():
    return costs_of(SmallResNet(dict.fromkeys(FORTY, 2)), FORTY)


@pytest.fixture(scope="module")
def resnet18():
    return costs_of(ResNet18({"digit": 10, "fashion": 10}), ("digit", "fashion"), 36)


def marks(figure):
    """How often each kind of mark is in the picture."""
    (axes,) = figure.axes
    return Counter(artist.get_gid() for artist in [*axes.patches, *axes.lines, *axes.texts])


def per_task(names, tasks):
    return dict.fromkeys(names, Partition.per_task(tasks))


def three_groups(tasks=FORTY):
    """Groups that are not side by side in the tasks' own order."""
    return Partition.of_groups([tasks[::3], tasks[1::3], tasks[2::3]], tasks)


def test_trunk_branch_point_and_groups(small):
    layout = network_layout(small, per_task(LATE, ("a", "b")))
    assert [stage.name for stage in layout.stages] == ["stem", "blocks.0", "blocks.1", "blocks.2", "heads"]
    kinds = {row.names[0]: [lane.kind for lane in row.lanes] for row in layout.rows}
    assert kinds["blocks.1.bn2"] == ["once"]
    assert kinds["blocks.2.conv1"] == kinds["blocks.2.bn1"] == ["own", "own"]
    assert kinds["blocks.2.conv2"] == kinds["blocks.2.bn2"] == ["shared", "shared"]
    assert kinds["blocks.2.shortcut.0"] == ["once"]  # beside the branch, not behind it
    assert [row.names[0] for row in layout.rows if row.fork] == ["blocks.2.conv1"]
    assert layout.rows[-1].names == ("heads.a", "heads.b")
    assert [(lane.tasks, lane.kind) for lane in layout.rows[-1].lanes] == [(("a",), "once"), (("b",), "once")]


@pytest.mark.parametrize("names", [LATE, ("stem.bn",), ("blocks.1.conv2", "blocks.2.shortcut.0")])
def test_every_layer_is_in_one_row_and_the_stages_macs_add_up(small, names):
    layers = per_task(names, ("a", "b"))
    layout = network_layout(small, layers)
    assert [name for row in layout.rows for name in row.names] == list(small.layers)
    assert sum(stage.plain_macs for stage in layout.stages) == small.of({}).macs
    assert sum(stage.macs for stage in layout.stages) == small.of(layers).macs


def test_resnet18_gets_a_row_for_every_layer_but_the_heads(resnet18):
    layers = per_task(["bn1", "layer3.0.conv2", "layer4.0.downsample.0"], ("digit", "fashion"))
    layout = network_layout(resnet18, layers)
    assert len(layout.rows) == len(resnet18.layers) - 1
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [stage.name for stage in layout.stages] == ["", *blocks, "", "heads"]
    drawn = marks(network_figure(resnet18, layers, "ResNet-18"))
    assert drawn["lane own"] == 2 * 3
    assert drawn["lane once"] == 1 + 2  # the stem's convolution and the heads
    assert drawn["lane shared"] == 2 * (len(layout.rows) - 5)
    assert drawn["fork"] == 2  # what fans out later has fanned out already
    assert drawn["group"] == 2


def test_forty_tasks_in_three_groups_have_three_lanes(forty):
    figure = network_figure(forty, dict.fromkeys(LATE, three_groups()), "three")
    drawn = marks(figure)
    assert drawn["lane own"] == 3 * len(LATE) and drawn["fork"] == 3
    own = sorted(p.get_bbox().bounds[::2] for p in figure.axes[0].patches if p.get_gid() == "lane own")
    widths = [width for _, width in own]
    assert max(widths) / min(widths) == pytest.approx(14 / 13, rel=0.05)  # as wide as the groups have tasks
    names = [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "group"]
    assert [name.splitlines()[0] for name in names] == ["14 tasks", "13 tasks", "13 tasks"]
    assert names[0].splitlines()[1].startswith("attribute_0")


def test_nested_groups_lie_below_each_other(forty):
    two = Partition.of_groups([FORTY[::3], FORTY[1::3] + FORTY[2::3]], FORTY)
    layout = network_layout(forty, {"blocks.1.conv1": two, "blocks.2.conv1": three_groups()})
    forks = {row.names[0]: [len(side.groups) for side in row.fork] for row in layout.rows if row.fork}
    assert forks == {"blocks.1.conv1": [1, 2], "blocks.2.conv1": [2, 3]}
    for row in layout.rows:
        for lane in row.lanes:
            places = sorted(layout.order.index(task) for task in lane.tasks)
            assert places == list(range(places[0], places[0] + len(places)))


def test_groups_that_do_not_nest_are_drawn_in_pieces(forty):
    halves = Partition.of_groups([FORTY[:20], FORTY[20:]], FORTY)
    evens = Partition.of_groups([FORTY[::2], FORTY[1::2]], FORTY)
    layout = network_layout(forty, {"blocks.1.conv1": halves, "blocks.2.conv1": evens})
    assert len(layout.groups) == 4
    assert marks(network_figure(forty, {"blocks.1.conv1": halves, "blocks.2.conv1": evens}, ""))["lane own"] > 4


def test_forty_groups_are_named_upright(forty):
    figure = network_figure(forty, per_task(LATE, FORTY), "each")
    names = [text for text in figure.axes[0].texts if text.get_gid() == "group"]
    assert len(names) == 40 and {text.get_rotation() for text in names} == {90}
    assert marks(figure)["lane own"] == 40 * len(LATE)


def test_a_hundred_groups_are_counted():
    tasks = tuple(f"t{number}" for number in range(100))
    costs = costs_of(SmallResNet(dict.fromkeys(tasks, 2)), tasks)
    figure = network_figure(costs, per_task(LATE, tasks), "hundred")
    assert [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "group"] == ["100 groups"]


class Deep(nn.Module):
    """More layers than a picture has room for."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)]) for _ in range(20))
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in "ab"})

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return {task: head(x) for task, head in self.heads.items()}


def test_equal_neighbours_of_a_deep_network_share_a_row():
    costs = CostModel(Deep(), ("a", "b"), torch.randn(2, 3))
    layout = network_layout(costs, per_task(["stages.7.2"], ("a", "b")))
    seven = next(stage for stage in layout.stages if stage.name == "stages.7")
    assert [[name[-1] for name in row.names] for row in seven.rows] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert len(layout.rows) == 19 + 3 + 1


@pytest.mark.parametrize(("tasks", "split"), [(("a", "b"), None), (FORTY, three_groups()), (FORTY, None)])
def test_no_two_texts_overlap(small, forty, tasks, split):
    costs = small if len(tasks) == 2 else forty
    layers = dict.fromkeys(("stem.bn", *LATE), split or Partition.per_task(tasks))
    figure = network_figure(costs, layers, "Which layers run per group, and which have copies of their own")
    figure.draw_without_rendering()
    around = figure.bbox
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0 for box in boxes)


def test_a_model_that_cannot_be_traced_is_drawn_without_multiply_adds(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no trace")

    monkeypatch.setattr("recon.plans.costing.cost_model.trace", refuse)
    costs = costs_of(SmallResNet({"a": 4, "b": 4}), ("a", "b"))
    assert not costs.traced
    drawn = marks(network_figure(costs, per_task(LATE, ("a", "b")), "untraced"))
    assert drawn["lane own"] == 2 * len(LATE) and drawn["fork"] == 2 and not drawn["macs"]


def test_the_picture_is_written(small, tmp_path):
    draw_network(small, per_task(LATE, ("a", "b")), tmp_path / "net.png", "small", samples=2)
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot make the folder"):
        draw_network(small, per_task(LATE, ("a", "b")), tmp_path / "file" / "net.png", "small")
