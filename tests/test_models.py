import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

import recon
from recon.layers import find_layers
from recon.models import MobileNetV2RASPP, ResNet18, SmallResNet
from tests import oracle

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


def test_resnet18_without_fc_has_its_heads_on_the_pooled_features():
    torch.manual_seed(0)
    model, twin = ResNet18({"a": 2}, in_channels=3, features=None).eval(), resnet18()
    twin.fc = nn.Identity()
    assert not twin.load_state_dict(model.state_dict(), strict=False).missing_keys
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(images)["a"], model.heads["a"](twin.eval()(images)))


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


# MobileNetV2 with R-ASPP.


def tiny_raspp(tasks=("a", "b", "c")):
    torch.manual_seed(0)
    return MobileNetV2RASPP({task: 2 + number for number, task in enumerate(tasks)}, width=8).double()


def test_each_task_has_channels_at_the_size_of_the_image():
    outputs = MobileNetV2RASPP({"seg": 5, "edge": 1}, in_channels=1)(torch.rand(2, 1, 33, 50))
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {"seg": (2, 5, 33, 50), "edge": (2, 1, 33, 50)}


def test_the_dilated_trunk_sees_what_torchvisions_sees_at_twice_the_resolution():
    model = tiny_raspp()
    oracle.perturb(model)
    plain = mobilenet_v2().features[:-1].double()
    plain.load_state_dict(model.features.state_dict())
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    fine, coarse = model.features.eval()(images), plain.eval()(images)
    assert fine.shape[2:] == (4, 6) and coarse.shape[2:] == (2, 3)
    torch.testing.assert_close(fine[:, :, ::2, ::2], coarse)


def test_the_pooled_branch_is_the_same_everywhere_and_the_local_one_is_a_convolution():
    raspp = tiny_raspp().raspp
    oracle.perturb(raspp)
    x = torch.rand(2, 320, 3, 4, dtype=torch.float64)
    local = raspp.local.eval()(x)
    pooled = raspp.pooled.eval()(torch.nn.functional.adaptive_avg_pool2d(x, 1))
    both = torch.cat([local, torch.nn.functional.interpolate(pooled, size=(3, 4), mode="bilinear")], dim=1)
    torch.testing.assert_close(raspp.eval()(x), raspp.project.eval()(both))


def test_the_decoder_sees_edges_that_the_last_layers_do_not():
    decoder = tiny_raspp().heads["a"].eval()
    high, low = torch.zeros(1, 8, 2, 2).double(), torch.zeros(1, 24, 8, 8).double()
    low[:, :, 3, 5] = 1
    seen = (decoder(high, low) - decoder(high, torch.zeros_like(low))).abs().sum(dim=1)[0].nonzero()
    assert seen[:, 0].min() == 1 and seen[:, 0].max() == 5 and seen[:, 1].min() == 3 and seen[:, 1].max() == 7


@pytest.mark.parametrize("kind", ["all", "quarter"])
def test_mobilenet_is_branched_like_any_other_module(kind):
    model = tiny_raspp()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    branched = recon.convert(model, oracle.random_plan(model, kind, seed=1), images)
    oracle.perturb(branched)
    for training in (False, True):
        oracle.check(tiny_raspp, branched.train(training), images)
