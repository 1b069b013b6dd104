import copy
from collections import Counter

import networkx
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from recon.branching.conversion import convert
from recon.branching.fans.trees import partition_of
from recon.branching.modules.branched import Branched
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan
from recon.errors import FanError, PlanError, ProblemError, UnknownNameError, UsageError
from recon.plans.costing.cost_model import CostModel
from recon.plans.costing.costs import costs
from recon.plans.costing.counting import unfused_kernels
from recon.support.network.forward import call
from recon.support.network.state import state_kept
from tests import oracle
from tests.scripting import script
from tests.zoo import TASKS, ZOO, PlainConv, image, vector

PER_TASK = Partition.per_task(TASKS)
# Where a layer's groups are coarser than its input's, each argument is restricted on its own: attention, which asks
# whether the query is the key, then computes their projections one by one, and makes other tensors on the way.
LOOSE = {"Attention", "TransformerEncoder", "VisionTransformer"}


# What really happens: the converted model is run, and counted by other means.


class Made(TorchDispatchMode):
    """The bytes of what kernels put out into memory that was not put in."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memory = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in memory:
                memory.add(tensor.untyped_storage()._cdata)
                self.total += tensor.numel() * tensor.element_size()
        return out


def measured(model, inputs):
    with state_kept(model), unfused_kernels():
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            call(model.eval(), inputs)
        with Made() as made:
            call(model.train(), inputs)
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() / 2, made.total


def assert_agrees(name, cost_model, plan, model, inputs):
    found = cost_model.of(plan.layers)
    parameters, macs, size = measured(convert(model, plan, inputs), inputs)
    assert cost_model.traced
    assert (found.parameters, found.macs) == (parameters, macs)
    assert found.activation_bytes == (pytest.approx(size, rel=0.05) if name in LOOSE else size)
    plain = cost_model.of({})
    assert found.parameters_ratio == pytest.approx(parameters / plain.parameters)
    assert found.macs_ratio == pytest.approx(macs / plain.macs)


@pytest.mark.parametrize("name", ZOO)
def test_it_agrees_with_the_counters_on_the_converted_model(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name].make(), ZOO[name].inputs(4)
    cost_model = CostModel(model, TASKS, inputs)
    plain = cost_model.of({})
    assert (plain.parameters, plain.macs, plain.activation_bytes) == measured(model, inputs)
    for kind, seed in (("quarter", 1), ("quarter", 16), ("one", 3), ("all", 1)):
        assert_agrees(name, cost_model, oracle.random_plan(model, kind, seed), model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_it_agrees_for_many_plans(name):
    model, inputs = ZOO[name].make(), ZOO[name].inputs(4)
    cost_model = CostModel(model, TASKS, inputs)
    for seed in range(20):
        for kind in oracle.KINDS:
            assert_agrees(name, cost_model, oracle.random_plan(model, kind, seed), model, inputs)


class WithHeads(nn.Module):
    """A backbone that gives one output, or a dict with one at `out`, and a head per task."""

    def __init__(self, backbone, width, tasks=TASKS):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})

    def forward(self, x):
        x = self.backbone(x)
        x = x["out"].mean((2, 3)) if isinstance(x, dict) else x
        return {task: head(x) for task, head in self.heads.items()}


def deeplab():
    segmentation = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    return segmentation(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


BACKBONES = {
    "ResNet18": (lambda: torchvision.models.resnet18(num_classes=5), 36),
    "ResNet50": (lambda: torchvision.models.resnet50(num_classes=5), 36),
    "MobileNetV3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 36),
    "VisionTransformer": (lambda: torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5), 16),
    "DeepLabV3": (deeplab, 36),
}


LONG = {"ResNet50", "DeepLabV3"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in BACKBONES])
def test_it_agrees_on_torchvisions_networks(name):
    torch.manual_seed(0)
    make, size = BACKBONES[name]
    model, inputs = WithHeads(make(), 5), torch.randn(2, 3, size, size)
    cost_model = CostModel(model, TASKS, inputs)
    for seed in (0, 1):
        assert_agrees(name, cost_model, oracle.random_plan(model, "quarter", seed), model, inputs)


# By hand.


def branched(cost_model, *names, groups=TASKS):
    return cost_model.of({name: Partition.of_groups(groups, cost_model.tasks) for name in names})


class Convs(nn.Module):
    """Three 1x1 convolutions in a row, then a head per task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in tasks})

    def forward(self, x):
        x = self.convs(x).amax((2, 3))
        return {task: head(x) for task, head in self.heads.items()}


N, PIXELS, FLOAT = 2, 64, 4


def test_costs_of_a_chain():
    cost_model = CostModel(Convs(), TASKS, torch.randn(N, 3, 8, 8))
    heads, parameters = N * 3 * 8, 12 + 20 + 20 + 3 * 10
    plain = cost_model.of({})
    assert plain.parameters == parameters
    assert plain.macs == N * PIXELS * (12 + 16 + 16) + heads
    assert plain.activation_bytes == N * FLOAT * (3 * 4 * PIXELS + 4 + 3 * 2)
    assert (plain.parameters_ratio, plain.macs_ratio, plain.runs) == (1.0, 1.0, {})
    second = branched(cost_model, "convs.1")
    assert second.parameters == parameters + 2 * 20
    assert second.macs == N * PIXELS * (12 + 3 * 32) + heads  # a head runs for its own task alone
    assert second.activation_bytes == N * FLOAT * (4 * PIXELS * (1 + 3 + 3) + 3 * 4 + 3 * 2)
    assert second.runs == {"convs.1": PER_TASK, "convs.2": PER_TASK, "": PER_TASK}
    assert second.macs_ratio == second.macs / plain.macs
    assert second.parameters_ratio == second.parameters / plain.parameters


def test_branching_further_down_adds_parameters_but_no_multiply_adds():
    cost_model = CostModel(Convs(), TASKS, torch.randn(N, 3, 8, 8))
    one, both = branched(cost_model, "convs.1"), branched(cost_model, "convs.1", "convs.2")
    assert both.macs == one.macs and both.activation_bytes == one.activation_bytes
    assert both.parameters == one.parameters + 2 * 20


def test_forty_tasks_in_three_groups_cost_three_times():
    tasks = tuple(f"task{number}" for number in range(40))
    cost_model = CostModel(Convs(tasks), tasks, torch.randn(N, 3, 8, 8))
    heads = N * 40 * 8
    body = cost_model.of({}).macs - heads
    groups = [tasks[:10], tasks[10:11], tasks[11:]]
    assert branched(cost_model, "convs.0", groups=groups).macs == 3 * body + heads
    assert branched(cost_model, "convs.0", "convs.2", groups=groups).macs == 3 * body + heads
    assert branched(cost_model, "convs.0", groups=tasks).macs == 40 * body + heads


def test_a_single_group_is_no_branch():
    cost_model = CostModel(Convs(), TASKS, torch.randn(N, 3, 8, 8))
    assert branched(cost_model, "convs.0", groups=[TASKS]) == cost_model.of({})


def test_an_alias_names_the_same_layer():
    model = ZOO["TwoNames"].make()
    cost_model = CostModel(model, TASKS, vector(4))
    assert "two.linear" not in cost_model.layers
    assert branched(cost_model, "two.linear") == branched(cost_model, "one.linear")


class Averages(nn.Module):
    """Its statistics end with a count, which is the same for all; it also changes values that these do not see."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, y=0.0):
        x = self.inner(x)
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.seen += 1
        return x - self.mean + y


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.average = Averages()
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        y = self.average(self.first(x), self.second(x))
        return {task: head(y) for task, head in self.heads.items()}


@pytest.mark.parametrize(
    "groups",
    [
        {"first": ["a", "b", "c"]},
        {"first": ["ab", "c"]},
        {"first": ["ab", "c"], "second": ["a", "b", "c"]},
        {"first": ["ab", "c"], "second": ["a", "bc"]},
    ],
    ids=["per task", "groups", "finer inputs", "crossing inputs"],
)
def test_statistics_follow_all_that_they_are_made_of_and_their_module_all_that_it_takes(groups):
    torch.manual_seed(0)
    model, inputs = Averaged().double(), vector(4)
    plan = BranchPlan.grouped({name: [list(group) for group in split] for name, split in groups.items()}, TASKS)
    assert_agrees("", CostModel(model, TASKS, inputs), plan, model, inputs)


class WritesFiner(nn.Module):
    """Adds in place to what may be in fewer groups than what is added."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        y = self.first(x)
        y.add_(self.second(x))
        return {task: head(y) for task, head in self.heads.items()}


@pytest.mark.parametrize("second", [["a", "b", "c"], ["a", "bc"]], ids="/".join)
def test_what_groups_share_is_copied_before_they_write_into_it(second):
    torch.manual_seed(0)
    model, inputs = WritesFiner().double(), vector(4)
    split = {"first": [["a", "b"], ["c"]], "second": [list(group) for group in second]}
    assert_agrees("", CostModel(model, TASKS, inputs), BranchPlan.grouped(split, TASKS), model, inputs)


# Which modules run per group.


def times_run(branched, path):
    """A counter of a module's runs, each group's counted."""
    module = branched.get_submodule(path)
    runs = Counter()

    def hook(module, args, kwargs):
        fanned = partition_of((args, kwargs))
        runs["all"] += 1 if fanned is None else len(fanned.groups)

    for part in module.branches.children() if isinstance(module, Branched) else [module]:
        part.register_forward_pre_hook(hook, with_kwargs=True)
    return runs


@pytest.mark.parametrize(
    "name", ["ResidualNet", "PlainConv", "UNet", "MTAN", "Structures", "SegNet", "Norms", "TwoInputs"]
)
def test_runs_are_what_runs_once_per_group(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name].make(), ZOO[name].inputs(4)
    cost_model = CostModel(model, TASKS, inputs)
    calls = {path: times_run(model, path) for path, module in model.named_modules() if not list(module.children())}
    call(model, copy.deepcopy(inputs))
    leaves = [path for path, runs in calls.items() if runs["all"] == 1]
    seen = set()
    for kind, seed in (("quarter", 0), ("one", 1), ("quarter", 3), ("all", 5)):
        plan = oracle.random_plan(model, kind, seed)
        runs = cost_model.of(plan.layers).runs
        converted = convert(model, plan, inputs).train()
        counters = {path: times_run(converted, path) for path in leaves}
        call(converted, copy.deepcopy(inputs))
        for path, counter in counters.items():
            assert counter["all"] == (len(runs[path].groups) if path in runs else 1), path
            seen.add(counter["all"])
    assert len(seen) > 1


# The graph.


def test_the_graph_is_the_dataflow():
    model = PlainConv()
    cost_model = CostModel(model.double(), TASKS, image(4))
    graph = cost_model.graph
    assert networkx.is_directed_acyclic_graph(graph)
    assert sorted(graph) == list(range(len(graph)))
    assert all(one < other for one, other in graph.edges)
    nodes = dict(graph.nodes(data=True))
    assert sum(node["macs"] for node in nodes.values()) == cost_model.of({}).macs
    assert sum(node["activation_bytes"] for node in nodes.values()) == cost_model.of({}).activation_bytes
    by_layer = {node["layer"]: number for number, node in nodes.items() if node["layer"]}
    assert list(by_layer) == list(cost_model.layers)
    assert all(nodes[number]["module"] == layer for layer, number in by_layer.items())
    first, head = by_layer["body.0.0"], by_layer["heads.heads.b"]
    assert (nodes[first]["name"], nodes[first]["tasks"], nodes[head]["tasks"]) == ("conv2d", TASKS, ("b",))
    assert networkx.has_path(graph, first, head)
    assert not networkx.has_path(graph, by_layer["heads.heads.a"], head)


# What can't be traced.


class PastPython(nn.Module):
    """Hides a matrix product from `__torch_function__`."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        x = self.first(x)
        with torch._C.DisableTorchFunction():
            x = x @ self.hidden.weight
        x = self.last(x)
        return {task: head(x) for task, head in self.heads.items()}


class Scripted(PastPython):
    """A part of it is TorchScript, whose kernels Python does not see called."""

    def __init__(self):
        super().__init__()
        self.hidden = script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, x):
        x = self.last(self.hidden(self.first(x)))
        return {task: head(x) for task, head in self.heads.items()}


class Guarded(PastPython):
    """Does not let itself be traced."""

    def forward(self, x):
        if torch._C._len_torch_function_stack():
            raise RuntimeError("no tracing here")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:")
@pytest.mark.parametrize(
    ("cls", "said"), [(PastPython, "aten.mm"), (Scripted, "aten.addmm"), (Guarded, "no tracing here")]
)
def test_what_cannot_be_traced_is_measured(cls, said):
    model, inputs = cls(), torch.randn(4, 6)
    cost_model = CostModel(model, TASKS, inputs)
    assert not cost_model.traced and said in " ".join(cost_model.unsupported)
    assert len(cost_model.graph) == 0
    plan = BranchPlan.per_task(["last"], TASKS)
    found, plain = cost_model.of(plan.layers), cost_model.of({})
    assert (found.parameters, found.macs, found.activation_bytes) == measured(convert(model, plan, inputs), inputs)
    assert found.macs - plain.macs == 2 * 4 * 16
    assert found.macs_ratio == found.macs / plain.macs
    assert found.runs == {"last": PER_TASK}
    whole = costs(model, plan, inputs)
    assert whole.measured and whole.macs == found.macs
    if cls is Scripted:
        assert branched(cost_model, "first").macs - plain.macs == 2 * 4 * (24 + 16 + 16)
    else:
        with pytest.raises(FanError):  # as convert says
            branched(cost_model, "first")


def test_a_forward_that_is_traced_is_not_measured():
    found = costs(Convs(), BranchPlan.per_task(["convs.1"], TASKS), torch.randn(N, 3, 8, 8))
    assert not found.measured
    assert costs(Convs(), None, torch.randn(N, 3, 8, 8)).measured


def test_the_network_run_once_per_task_is_measured():
    model, inputs = Convs(), torch.randn(N, 3, 8, 8)
    plan = convert(model, BranchPlan.per_task(["convs.2"], TASKS), inputs, mode="per-task").branch_plan
    found = costs(model, plan, inputs)
    assert found.measured and found.macs == 3 * costs(model, None, inputs).macs


# Around it.


@pytest.mark.parametrize(
    "name", ["Norms", "Parametrized", "FilledCache", "Cached", "RunningStatistics", "GradientHooks"]
)
def test_it_leaves_the_model_as_it_is(name):
    model, inputs = ZOO[name].make(), ZOO[name].inputs(4)
    list(model.modules())[-1].eval()
    before = oracle.snapshot(model)
    cost_model = CostModel(model, TASKS, inputs)
    cost_model.of({cost_model.layers[0]: PER_TASK})
    oracle.assert_untouched(model, before)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_model_costs_what_it_costs_for_one_sample():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    found = costs(model, None, vector(1))
    assert (found.parameters, found.macs, found.activation_bytes) == (36, 24, None)  # batch norm can't train on it


def test_bad_input():
    model, inputs = Convs(), torch.randn(N, 3, 8, 8)
    cost_model = CostModel(model, TASKS, inputs)
    with pytest.raises(UnknownNameError, match=r"'convs\.9'.*'convs\.\d'"):
        branched(cost_model, "convs.9")
    with pytest.raises(PlanError, match=r"'convs\.0' is split over tasks \['a', 'b'\].*\['a', 'b', 'c'\]"):
        cost_model.of({"convs.0": Partition.per_task(("a", "b"))})
    with pytest.raises(UsageError, match="forward fails on the example inputs"):
        CostModel(model, TASKS, torch.randn(N, 5, 8, 8))
    with pytest.raises(ProblemError, match="no entry for task 'd'"):
        CostModel(model, (*TASKS, "d"), inputs)
    converted = convert(model, BranchPlan.per_task(["convs.0"], TASKS), inputs)
    with pytest.raises(PlanError, match="branched already"):
        CostModel(converted, TASKS, inputs)
    with pytest.raises(UsageError, match="wrapped in DataParallel"):
        CostModel(nn.DataParallel(model), TASKS, inputs)
