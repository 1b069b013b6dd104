import pytest
import torch
from torch import nn

from recon.errors import UnknownNameError, UsageError
from recon.support.network.layers import canonical_name, find_layers, places
from tests.zoo import ZOO

# What stands before the heads, by name and kind, with the local names of the parameters.
EXPECTED = {
    "PlainConv": [
        "body.0.0 Conv2d weight",
        "body.0.1 BatchNorm2d weight bias",
        "body.1.0 Conv2d weight",
        "body.1.1 BatchNorm2d weight bias",
        "body.3.0 Conv2d weight",
        "body.3.1 BatchNorm2d weight bias",
    ],
    "TiedWeights": ["embed Embedding weight", "body Linear weight bias", "decode Linear bias"],
    "TwoNames": [
        "scale Parameter scale",
        "first Linear weight bias",
        "one.linear Linear weight bias",
        "one.norm BatchNorm1d weight bias",
    ],
    "BareParameters": [
        "cls_token Parameter cls_token",
        "pos_embed Parameter pos_embed",
        "first Conv2d weight bias",
        "norm LayerNorm weight bias",
    ],
    "ParameterLists": [
        "first Linear weight bias",
        "gains.0 Parameter 0",
        "gains.1 Parameter 1",
        "gains.2 Parameter 2",
        "shifts.one Parameter one",
        "shifts.two Parameter two",
    ],
    "Attention": [
        "first Linear weight bias",
        "attention MultiheadAttention in_proj_weight in_proj_bias out_proj.weight out_proj.bias",
    ],
    "Parametrized": [
        "first ParametrizedLinear bias parametrizations.weight.original0 parametrizations.weight.original1",
        "second ParametrizedLinear bias parametrizations.weight.original",
        "third ParametrizedLinear parametrizations.weight.original0 parametrizations.weight.original1",
    ],
    "Recurrent": [
        "first Linear weight bias",
        "lstm LSTM weight_ih_l0 weight_hh_l0 bias_ih_l0 bias_hh_l0 weight_ih_l1",
        "gru GRU weight_ih_l0 weight_hh_l0 bias_ih_l0 bias_hh_l0 weight_ih_l0_reverse",
        "cell GRUCell weight_ih weight_hh bias_ih bias_hh",
    ],
    "Norms": [
        "first Conv2d weight bias",
        "norms.1 BatchNorm2d weight bias",
        "norms.2 BatchNorm2d weight bias",
        "norms.3 InstanceNorm2d weight bias",
        "norms.4 GroupNorm weight bias",
        "norms.5 LayerNorm weight bias",
        "norms.6 RMSNorm weight",
        "norms.7 SyncBatchNorm weight bias",
    ],
    "Embeddings": ["words Embedding weight", "bag EmbeddingBag weight", "pick Linear weight bias"],
    "StatisticsAroundStatistics": [
        "first Linear weight bias",
        "outer.bare Parameter bare",
        "outer.linear Linear weight bias",
        "outer.norm BatchNorm1d weight bias",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_of_the_zoo(name):
    found = [
        " ".join([layer.name, layer.kind, *layer.parameters])
        for layer in find_layers(ZOO[name].make())
        if not layer.name.startswith(("heads", "last"))
    ]
    expected = EXPECTED[name]
    assert len(found) == len(expected)
    assert all(one.startswith(other) for one, other in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_belongs_to_one_layer(name):
    model = ZOO[name].make()
    layers = find_layers(model)
    owned = [p for layer in layers for p in layer.parameters.values()]
    assert len(owned) == len(set(owned)) and set(owned) == set(model.parameters())
    assert sum(layer.size for layer in layers) == sum(p.numel() for p in model.parameters())
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        for local, parameter in layer.parameters.items():
            path = layer.name if layer.kind == "Parameter" else f"{layer.name}.{local}"
            assert model.get_parameter(path) is parameter
            assert layer.shapes[local] == list(parameter.shape)


def test_aliases():
    layers = {layer.name: layer.aliases for layer in find_layers(ZOO["TwoNames"].make())}
    assert layers["one.linear"] == ("two.linear",)
    assert layers["one.norm"] == ("one.alias", "two.norm", "two.alias")
    assert layers["scale"] == ("one.scale", "two.scale")
    every = find_layers(ZOO["TwoNames"].make())
    assert canonical_name(every, "two.alias") == canonical_name(every, "one.norm") == "one.norm"
    paths = [place.path for place in places(ZOO["TwoNames"].make())]
    assert len(paths) == len(set(paths)) and {"one.norm", "two.alias", "two.scale"} <= set(paths)


def test_an_unknown_name():
    with pytest.raises(UnknownNameError, match=r"no layer named 'body.3.bn'. Did you mean"):
        canonical_name(find_layers(ZOO["PlainConv"].make()), "body.3.bn")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_container_of_torchs_own_is_no_layer_but_what_is_in_it():
    model = nn.ModuleDict({"s": nn.Sequential(nn.Linear(2, 2)), "t": nn.Transformer(4, 1, 1, 1, 4)})
    kinds = {layer.kind for layer in find_layers(model)}
    assert kinds == {"Linear", "MultiheadAttention", "LayerNorm"}


def test_the_model_may_be_a_layer_itself():
    assert [layer.name for layer in find_layers(nn.Linear(2, 2))] == ["weight", "bias"]
    assert find_layers(nn.ReLU()) == []


@pytest.mark.parametrize("model", [nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.Sequential(nn.LazyConv2d(3, 1)))])
def test_a_lazy_module(model):
    with pytest.raises(UsageError, match=r"0.weight' is not initialised yet \(a lazy module\). Run the model once"):
        find_layers(model)
    holder = nn.Module()
    holder.bare = nn.UninitializedParameter()
    with pytest.raises(UsageError, match="'bare' is not initialised yet"):
        find_layers(holder)


def test_parameters_that_are_none_are_no_layers():
    holder = nn.Module()
    holder.register_parameter("nothing", None)
    holder.add_module("nobody", None)
    holder.something = nn.Parameter(torch.ones(2))
    assert [layer.name for layer in find_layers(holder)] == ["something"]
