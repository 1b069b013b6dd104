import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from recon.errors import UnknownNameError, UsageError
from recon.support.network.layer_choice import choose_layers, join_names
from recon.support.network.layers import find_layers

QUERY, VALUE = (f"model.encoder.layer.{{}}.attention.{name}" for name in ("query", "value"))
ADAPTERS = [
    f"{module.format(block)}.{matrix}.default"
    for block in (0, 10)
    for module in (QUERY, VALUE)
    for matrix in ("lora_A", "lora_B")
]


class Adapter(nn.Module):
    def __init__(self, trainable_base=False):
        super().__init__()
        self.base_layer = nn.Linear(4, 4).requires_grad_(trainable_base)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})


@pytest.fixture(scope="module")
def resnet():
    return resnet18(weights=None)


def names_of(layers):
    return [layer.name for layer in layers]


def test_without_a_choice_there_are_all_layers(resnet):
    assert choose_layers(resnet) == find_layers(resnet)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"layers": "bn1"}, ["bn1"]),
        (
            {"layers": r".*\.downsample\..*", "exclude": r"layer[34]\..*"},
            ["layer2.0.downsample.0", "layer2.0.downsample.1"],
        ),
        ({"layers": ["fc", "conv1"]}, ["conv1", "fc"]),
        ({"layers": [r"layer1\.0\.conv.", "bn1"]}, ["bn1", "layer1.0.conv1", "layer1.0.conv2"]),
        ({"layers": r"layer1\.0\..*", "exclude": [".*bn1", ".*bn2"]}, ["layer1.0.conv1", "layer1.0.conv2"]),
        ({"exclude": r"layer.*|bn1"}, ["conv1", "fc"]),
        ({"layers": "(?i)FC"}, ["fc"]),
    ],
    ids=["whole-name", "both", "model-order", "regex-list", "exclude-list", "exclude-only", "flags"],
)
def test_patterns_match_whole_names(resnet, choice, expected):
    assert names_of(choose_layers(resnet, **choice)) == expected


def test_a_name_means_that_layer_alone_though_its_dots_match_others():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": nn.Linear(2, 2)})
    assert names_of(choose_layers(model, layers="a.b")) == ["a.b"]
    assert names_of(choose_layers(model, layers="a.b.?")) == ["a.b", "a_b"]


def test_a_layer_is_chosen_by_any_of_its_paths():
    model = nn.ModuleDict({"encoder": nn.Embedding(3, 2), "head": nn.Linear(2, 2)})
    model["decoder"] = model["encoder"]
    assert names_of(choose_layers(model, layers="decoder")) == ["encoder"]
    assert names_of(choose_layers(model, exclude="decoder")) == ["head"]


def test_a_wrapper_adds_nothing_to_the_names():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert names_of(choose_layers(model, exclude="0")) == ["1"]


def test_a_unit_of_a_block(resnet):
    layers = {layer.name: layer for layer in choose_layers(resnet, units=r"layer\d+\.\d+")}
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert list(layers) == ["conv1", "bn1", *blocks, "fc"]
    block = layers["layer2.0"]
    inside = ["conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"]
    assert block.members == tuple(f"layer2.0.{name}" for name in inside)
    assert block.kind == "6 layers"
    assert {name: id(p) for name, p in block.parameters.items()} == {
        name: id(p) for name, p in resnet.layer2[0].named_parameters()
    }
    assert block.size == sum(p.numel() for p in resnet.layer2[0].parameters())
    assert layers["fc"].members == ()


def test_a_unit_joins_what_is_left(resnet):
    layers = choose_layers(resnet, layers=r"layer1\..*", exclude=r".*\.bn\d", units=r"layer\d+\.\d+")
    assert [(layer.name, layer.kind) for layer in layers] == [("layer1.0", "2 Conv2d"), ("layer1.1", "2 Conv2d")]


def test_a_unit_of_an_adapter():
    model = nn.ModuleDict({"q": Adapter(), "k": nn.Linear(4, 4), "v": Adapter()})
    layers = choose_layers(model, units="lora_[AB]")
    assert [(layer.name, layer.members) for layer in layers] == [
        ("q.base_layer", ()),
        ("q", ("q.lora_A.default", "q.lora_B.default")),
        ("k", ()),
        ("v.base_layer", ()),
        ("v", ("v.lora_A.default", "v.lora_B.default")),
    ]
    assert list(layers[1].parameters) == ["lora_A.default.weight", "lora_B.default.weight"]


def test_frozen_layers_join_no_unit():
    assert choose_layers(nn.ModuleDict({"q": Adapter()}), units="q")[1].members == (
        "q.lora_A.default",
        "q.lora_B.default",
    )
    joined = choose_layers(nn.ModuleDict({"q": Adapter(trainable_base=True)}), units="q")
    assert [layer.members for layer in joined] == [("q.base_layer", "q.lora_A.default", "q.lora_B.default")]


def test_bare_parameters_join_by_their_own_names():
    block = nn.Module()
    block.scale, block.linear = nn.Parameter(torch.ones(2)), nn.Sequential(nn.Linear(2, 2))
    (unit,) = choose_layers(nn.ModuleDict({"block": block}), units="block")
    assert unit.members == ("block.scale", "block.linear.0")
    assert list(unit.parameters) == ["scale", "linear.0.weight", "linear.0.bias"]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ("lora_[AB]", {m.format(b): 2 for b in (0, 10) for m in (QUERY, VALUE)}),
        ("query|value", {m.format(b): 2 for b in (0, 10) for m in (QUERY, VALUE)}),
        (r"layer\.\d+", {f"model.encoder.layer.{b}": 4 for b in (0, 10)}),
        (r"layer\.1", None),
        (r"LORA_.", None),
        (r"(?i)LORA_.", {m.format(b): 2 for b in (0, 10) for m in (QUERY, VALUE)}),
        ("encoder", {"model.encoder": 8}),
        (r".*lora_A\..*", {"model.encoder.layer": 4}),
        (r"(?P<unit>.*)\.(lora_A|lora_B)", {m.format(b): 2 for b in (0, 10) for m in (QUERY, VALUE)}),
        (r"(?P<unit>query|value)", {"query": 4, "value": 4}),
        ([r"layer\.10", "query"], {"model.encoder.layer.10": 4, QUERY.format(0): 2}),
    ],
    ids=[
        "pieces",
        "modules",
        "blocks",
        "part-of-a-part",
        "case",
        "flags",
        "one",
        "rest",
        "group",
        "across",
        "first-wins",
    ],
)
def test_what_a_unit_joins(units, expected):
    if expected is None:
        with pytest.raises(UnknownNameError, match="units="):
            join_names(ADAPTERS, units)
    else:
        assert {unit: len(members) for unit, members in join_names(ADAPTERS, units).items()} == expected


def test_layers_without_a_common_path_are_named_by_their_beginnings():
    assert join_names(["stem.conv", "stem.norm", "head", "tail"], r"stem\..*|head") == {
        "stem+head": ["stem.conv", "stem.norm", "head"]
    }


def test_what_stays_alone_is_no_unit_and_said(resnet, caplog):
    choose_layers(resnet, units=r"layer\d+\.\d+")
    assert not caplog.records
    units = {layer.name: layer.members for layer in choose_layers(resnet, units=r"conv\d") if layer.members}
    assert units["layer1.0"] == ("layer1.0.conv1", "layer1.0.conv2") and len(units) == 8
    assert "leaves alone what it matches elsewhere: conv1." in caplog.text


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"layers": "layer1"}, UsageError, r"8 begin with it: layer1.0.conv1, .* Write 'layer1\\\.\.\*'"),
        ({"exclude": "layer1|layer2"}, UsageError, r"Write '\(\?:layer1\|layer2\)\\\.\.\*'"),
        ({"layers": "conv"}, UnknownNameError, "no layer named 'conv'. Did you mean 'conv1'.*layers= matches whole"),
        ({"exclude": ["fc", "fd"]}, UnknownNameError, "no layer named 'fd'. Did you mean 'fc'.*exclude="),
        ({"layers": "(fc"}, UsageError, r"layers='\(fc' is not a regular expression: missing \)"),
        ({"layers": "fc|bn1", "exclude": ["fc", "bn1"]}, UsageError, r"leaves none of the 2 layers \(bn1, fc\)"),
        ({"layers": []}, UsageError, "a list of one or more"),
        ({"exclude": 3}, UsageError, "exclude is 3"),
        ({"units": [None]}, UsageError, "units is"),
        ({"units": "bloc"}, UnknownNameError, "units= looks for whole parts"),
        ({"units": "fc"}, UsageError, r"joins nothing: of the layers that it matches \(fc\), no two"),
        ({"layers": "fc", "units": "layer1"}, UnknownNameError, "no trainable layer named 'layer1'"),
        ({"units": "(layer1"}, UsageError, "not a regular expression"),
        ({"units": r"layer1\.(?P<unit>x?)0"}, UsageError, "has no text"),
        ({"units": r"(?P<unit>conv1)"}, UsageError, "'conv1', but a layer has that name"),
        ({"units": [r"(?P<unit>layer).\.0", r"(?P<unit>layer).\.1"]}, UsageError, "another unit has that name"),
        ({"units": ["layer1", "layer1"]}, UnknownNameError, "'layer1'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_choices_are_refused(resnet, choice, error, message):
    with pytest.raises(error, match=message):
        choose_layers(resnet, **choice)
