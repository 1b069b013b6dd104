"""Models of other libraries, and those that pack, predict or adapt: profiled and branched as any other."""

import copy

import pytest
import torch
from torch import nn

import recon
from recon.support.network.layers import find_layers
from tests import oracle
from tests.companions import check_branched, check_profiled_step

TASKS = ("a", "b")


def heads(width, tasks=TASKS):
    return nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})


# LoRA.


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.mix = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = heads(8)

    def forward(self, x):
        scores = self.query(x) @ self.value(x).mT
        x = torch.tanh(self.mix(scores.softmax(-1) @ self.value(x)).mean(1))
        return {task: head(x) for task, head in self.heads.items()}


@pytest.fixture
def adapted():
    """A frozen encoder whose projections are adapted, and whose heads train."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["heads.a", "heads.b"], lora_dropout=0.0
    )
    model = peft.get_peft_model(Encoder(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins at zero, and its partner's gradient with it
            nn.init.normal_(parameter, std=0.3)
    return model


def test_adapters_are_profiled_branched_and_trained_and_nothing_else(adapted):
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    losses = {task: lambda out, target: (out - target).square().mean() for task in TASKS}
    targets = {task: torch.randn(5, 2, dtype=torch.float64) for task in TASKS}
    cmap = check_profiled_step(adapted, lambda m: {t: losses[t](m(x)[t], targets[t]) for t in TASKS})
    names = [layer.name for layer in cmap.layers]
    assert len(names) == 4 and all(name.endswith((".lora_A.default", ".lora_B.default")) for name in names)
    branched = check_branched(adapted, recon.plan(cmap, adapted, layers=cmap.ranking()[:2]), x)
    before = copy.deepcopy(branched.state_dict())
    optimizer = torch.optim.SGD([p for p in branched.parameters() if p.requires_grad], lr=0.1)
    recon.train(branched, [(x, targets)] * 3, losses, method="pcgrad", optimizer=optimizer)
    moved = {name for name, value in branched.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in branched.named_parameters() if parameter.requires_grad}
    assert moved == trained and all("lora" in name or "heads" in name for name in moved)
    assert any("branches.b" in name for name in moved)


def test_the_two_matrices_of_an_adapter_are_one_unit(adapted):
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    profiler = recon.Profiler(adapted, units="lora_[AB]")
    outputs = adapted(x)
    profiler.backward({"a": outputs["a"].square().mean(), "b": (outputs["b"] - 1).square().mean()})
    cmap = profiler.conflict_map()
    query, value = (f"base_model.model.{name}" for name in ("query", "value"))
    assert {layer.name: layer.kind for layer in cmap.layers} == {query: "2 Linear", value: "2 Linear"}
    plan = recon.plan(cmap, adapted, top_k=1, select="last")
    assert list(plan.layers) == [f"{value}.lora_A.default", f"{value}.lora_B.default"]
    branched = check_branched(adapted, plan, x)
    for task in TASKS:
        oracle.assert_close(
            recon.extract_task(branched, task).merge_and_unload()(x)[task], branched.eval()(x)[task], task
        )


def test_a_task_of_a_branched_adapter_merges_into_a_plain_model(adapted):
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    layers = [layer.name for layer in find_layers(adapted) if "query.lora" in layer.name]
    branched = recon.convert(adapted, recon.BranchPlan.per_task(layers, TASKS), x).eval()
    oracle.perturb(branched)
    for task in TASKS:
        merged = recon.extract_task(branched, task).merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        oracle.assert_close(merged(x)[task], branched(x)[task], task)


# Graphs.


class GraphNet(nn.Module):
    """Predicts two things of every node."""

    def __init__(self, conv):
        super().__init__()
        self.first, self.second = conv(6, 8), conv(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.heads = heads(8)

    def forward(self, x, edge_index):
        x = torch.tanh(self.norm(self.first(x, edge_index)))
        x = torch.tanh(self.second(x, edge_index))
        return {task: head(x) for task, head in self.heads.items()}


def gin(geometric, width_in, width_out):
    return geometric.nn.GINConv(
        nn.Sequential(nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out)), train_eps=True
    )


@pytest.mark.parametrize("kind", ["GCNConv", "SAGEConv", "GATConv", "GINConv"])
def test_graph_networks(kind):
    geometric = pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    conv = getattr(geometric.nn, kind)
    model = GraphNet(conv if kind != "GINConv" else lambda *widths: gin(geometric, *widths)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 1, 2], [1, 2, 3, 4, 5, 6, 0, 0, 1]])
    targets = {task: torch.randn(7, 2, dtype=torch.float64) for task in TASKS}
    cmap = check_profiled_step(model, lambda m: {t: (m(x, edges)[t] - targets[t]).square().mean() for t in TASKS})
    for layers in ({"top_k": 1}, {"layers": [cmap.layers[-1].name]}, {"layers": [layer.name for layer in cmap.layers]}):
        check_branched(model, recon.plan(cmap, model, **layers), recon.inputs(x, edge_index=edges))


# Packed sequences.


class Reader(nn.Module):
    """Reads sentences of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.reader = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.heads = heads(8)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.reader(packed)
        states, lengths = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
        pooled = states.sum(1) / lengths[:, None] + torch.cat([last[-2], last[-1]], dim=1)
        return {task: head(pooled) for task, head in self.heads.items()}


@pytest.mark.parametrize("layers", [["embed"], ["reader"], ["embed", "reader"]], ids="+".join)
def test_recurrent_layers_on_packed_sequences(layers):
    torch.manual_seed(0)
    model, x, lengths = Reader().double(), torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([2, 4, 1])
    targets = {task: torch.randn(3, 2, dtype=torch.float64) for task in TASKS}
    cmap = check_profiled_step(model, lambda m: {t: (m(x, lengths)[t] - targets[t]).square().mean() for t in TASKS})
    assert [layer.name for layer in cmap.layers] == ["embed", "reader"]
    check_branched(model, recon.BranchPlan.per_task(layers, TASKS), recon.inputs(x, lengths))


# Detection.


@pytest.fixture
def detector():
    """A Faster R-CNN of the smallest kind, with a backbone of two layers."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    backbone.out_channels = 8
    return FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(sizes=((8, 16, 32),), aspect_ratios=((1.0,),)),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=8,
        rpn_batch_size_per_image=16,
    ).double()


def found_in(detector):
    """Its losses, with the same anchors and proposals drawn each time."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 48, 64, generator=draw, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[4, 4, 30, 40], [20, 10, 50, 30]]).double(), torch.tensor([[2, 2, 20, 20]]).double()]
    targets = [{"boxes": b, "labels": torch.arange(len(b)) + 1} for b in boxes]
    torch.manual_seed(3)
    return detector(images, targets)


def test_the_losses_of_a_detector_are_tasks(detector):
    cmap = check_profiled_step(detector, found_in)
    assert cmap.tasks == ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    observed = {layer.name: int(layer.observed.sum()) for layer in cmap.layers}
    # All four reach the backbone, two the region proposals' trunk and two the boxes' head.
    assert observed == {
        "backbone.0": 6,
        "backbone.2": 6,
        "rpn.head.conv.0.0": 1,
        "roi_heads.box_head.fc6": 1,
        "roi_heads.box_head.fc7": 1,
    }


@pytest.mark.parametrize("method", ["pcgrad", "cagrad"])
def test_a_detector_takes_the_steps_of_a_gradient_method(detector, method):
    losses = found_in(detector)
    parameters = list(detector.parameters())
    rows = {
        t: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for t, loss in losses.items()
    }
    shared = [i for i in range(len(parameters)) if sum(row[i] is not None for row in rows.values()) > 1]
    zero = [torch.zeros_like(p) for p in parameters]
    J = torch.stack(
        [torch.cat([(zero[i] if row[i] is None else row[i]).flatten() for i in shared]) for row in rows.values()]
    )
    recon.backward(losses, detector, recon.methods.get(method))
    update = torch.cat([parameters[i].grad.flatten() for i in shared])
    oracle.assert_close(update, recon.methods.get(method)(J), method, tolerance=1e-6)
    for i in set(range(len(parameters))) - set(shared):
        (alone,) = (row[i] for row in rows.values() if row[i] is not None)
        oracle.assert_close(parameters[i].grad, alone, "what one loss alone reaches")
