import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import recon
from recon.layers import find_layers
from recon.models import ResNet18, SmallResNet

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "published-maps"


def test_one_output_of_logits_per_task():
    outputs = SmallResNet({"digit": 10, "parity": 2}, in_channels=3)(torch.randn(5, 3, 12, 12))
    assert {task: tuple(logits.shape) for task, logits in outputs.items()} == {"digit": (5, 10), "parity": (5, 2)}


def test_blocks_halve_the_image_twice():
    shapes = []
    model = SmallResNet({"a": 2})
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(2, 1, 12, 12))
    assert shapes == [(8, 12, 12), (16, 6, 6), (32, 3, 3)]


def test_the_shortcut_is_the_identity_where_the_shape_stays():
    block = SmallResNet({"a": 2}).blocks[0].eval()
    nn.init.zeros_(block.bn2.weight)  # silences the main path
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_every_parameter_but_the_other_head_serves_a_task():
    model = SmallResNet({"a": 3, "b": 2})
    model(torch.randn(4, 1, 12, 12))["a"].square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {"heads.b.weight", "heads.b.bias"}


# ResNet-18.


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return ResNet18({"digit": 10, "fashion": 7})


def test_resnet18_is_torchvisions_with_heads(resnet):
    twin = resnet18(num_classes=100)
    twin.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    left = twin.load_state_dict(resnet.state_dict(), strict=False)
    assert not left.missing_keys and all(key.startswith("heads.") for key in left.unexpected_keys)
    images = torch.rand(3, 1, 36, 36)
    features = twin.eval()(images).relu()
    for task, logits in resnet.eval()(images).items():
        torch.testing.assert_close(logits, resnet.heads[task](features))
        assert logits.shape == (3, resnet.heads[task].out_features)


def test_channels_and_features_of_resnet18():
    model = ResNet18({"a": 2}, in_channels=3, features=5)
    assert model.heads["a"].in_features == 5 and model(torch.rand(2, 3, 32, 32))["a"].shape == (2, 2)


def test_resnet18_is_branched_like_any_other_module(resnet):
    images = torch.rand(4, 1, 36, 36)
    plan = recon.BranchPlan.per_task(["bn1", "layer1.0.bn1", "fc"], ("digit", "fashion"))
    branched = recon.convert(resnet, plan, images)
    assert recon.verify(resnet, branched, images)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published scores in ../shared/data")
def test_the_published_scores_are_of_these_layers(resnet):
    published = json.loads((PUBLISHED / "multi-fashion-mnist-resnet18-S-0.1.json").read_text())
    layers = {layer.name for layer in find_layers(resnet)}
    assert layers - {"heads.digit", "heads.fashion"} == set(published)


def test_a_small_backbone_does_not_wait_for_torchvision():
    code = "import recon.models, sys; recon.models.SmallResNet; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"ResNet18", "SmallResNet"} <= set(dir(recon.models))
    with pytest.raises(AttributeError, match="no attribute 'LeNet'"):
        recon.models.LeNet  # noqa: B018
