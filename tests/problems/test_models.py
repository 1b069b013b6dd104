import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18, segmentation
from torchvision.models import vit_b_16 as torchvision_vit_b_16

import recon
from recon.errors import UsageError
from recon.models import MobileNetV2RASPP, ResNet18, SmallResNet, ViT, deeplabv3_resnet50, fcn_resnet50, vit_b_16
from recon.support.network.layers import find_layers
from tests import oracle

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published-maps"


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


def by_lists(model, copies, x):
    """ResNet-18 branched by hand as the published code does it: from the first branched layer on, a value per task.

    Args:
        model: the plain network.
        copies: `{layer: {task: its copy}}`.
        x: images.
    """
    paths = {module: path for path, module in model.named_modules()}
    tasks = list(model.heads)

    def run(module, values):
        by_task = copies.get(paths[module], {})
        return {task: by_task.get(task, module)(values[task]) for task in tasks}

    def block(part, values):
        inner = run(part.bn2, run(part.conv2, relu(run(part.bn1, run(part.conv1, values)))))
        if part.downsample is not None:
            values = run(part.downsample[1], run(part.downsample[0], values))
        return {task: torch.relu(inner[task] + values[task]) for task in tasks}

    def relu(values):
        return {task: value.relu() for task, value in values.items()}

    values = run(model.maxpool, relu(run(model.bn1, run(model.conv1, dict.fromkeys(tasks, x)))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for part in stage:
            values = block(part, values)
    pooled = {task: torch.flatten(value, 1) for task, value in run(model.avgpool, values).items()}
    return {task: model.heads[task](value) for task, value in relu(run(model.fc, pooled)).items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_resnet18_branched_by_hand_gives_the_same_to_the_last_bit(resnet, training):
    images = torch.rand(4, 1, 36, 36)
    names = ["bn1", "layer1.0.conv2", "layer2.0.downsample.0", "layer2.0.downsample.1", "layer4.1.bn2", "fc"]
    branched = recon.convert(resnet, recon.BranchPlan.per_task(names, tuple(resnet.heads)), images).train(training)
    with torch.no_grad():  # statistics stay alike: the published code keeps one set for all tasks
        for parameter in branched.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    copies = {
        name: {task: branched.get_submodule(f"{name}.branches.{task}") for task in resnet.heads} for name in names
    }
    resnet.load_state_dict(recon.extract_task(branched, "digit").state_dict())  # what is shared
    expected = by_lists(resnet.train(training), copies, images)
    for task, logits in branched(images).items():
        assert torch.equal(logits, expected[task]), task


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published scores in ../shared/data")
def test_the_published_scores_are_of_these_layers(resnet):
    published = json.loads((PUBLISHED / "multi-fashion-mnist-resnet18-S-0.1.json").read_text())
    layers = {layer.name for layer in find_layers(resnet)}
    assert layers - {"heads.digit", "heads.fashion"} == set(published)


# Vision transformers.


def test_vit_is_torchvisions_with_heads():
    twin = VisionTransformer(12, 4, 2, 2, 8, 16, num_classes=3)
    model = ViT(
        {"a": 3, "b": 5}, in_channels=3, image_size=12, layers=2, attention_heads=2, features=8, mlp_features=16
    )
    theirs = {name: value for name, value in twin.state_dict().items() if not name.startswith("heads.")}
    assert theirs.keys() == {name for name in model.state_dict() if not name.startswith("heads.")}
    model.load_state_dict(theirs, strict=False)
    twin.heads = nn.Identity()
    images = torch.rand(2, 3, 12, 12)
    for task, logits in model.eval()(images).items():
        torch.testing.assert_close(logits, model.heads[task](twin.eval()(images)))
        assert logits.shape == (2, model.heads[task].out_features)


@pytest.mark.parametrize("size", [12, 36, 64])
def test_vit_takes_the_images_of_the_problems(size):
    model = ViT({"a": 2}, image_size=(size, size))
    assert model(torch.rand(2, 1, size, size))["a"].shape == (2, 2)


def test_the_stem_of_vit_starts_as_torchvisions():
    torch.manual_seed(0)
    stem = ViT({"a": 2}, in_channels=2, image_size=16, patch_size=8, features=512).conv_proj
    scaled = stem.weight * (2 * 8 * 8) ** 0.5  # normal with variance 1 / fan-in, and no bias
    assert abs(scaled.std() - 1) < 0.02 and abs(scaled.mean()) < 0.02 and not stem.bias.any()


def test_the_first_step_of_vit_reaches_the_shared_layers():
    model = ViT({"a": 2, "b": 3}, image_size=8)
    model(torch.rand(2, 1, 8, 8))["a"].square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {"heads.b.weight", "heads.b.bias"}


def test_vit_b_16_has_the_paper_s_sizes():
    with torch.device("meta"):
        theirs, ours = torchvision_vit_b_16(), vit_b_16({"a": 10})

    def shapes(model):
        return {name: p.shape for name, p in model.named_parameters() if not name.startswith("heads.")}

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("size", [30, (36, 32)])
def test_images_that_vit_cannot_cut(size):
    with pytest.raises(UsageError, match=r"cannot be cut into a square of 4x4 patches"):
        ViT({"a": 2}, image_size=size)


# Torchvision's dense networks.

DENSE = {fcn_resnet50: segmentation.fcn_resnet50, deeplabv3_resnet50: segmentation.deeplabv3_resnet50}


@pytest.mark.parametrize("make", DENSE)
def test_a_dense_network_is_torchvisions_with_a_head_for_each_task(make):
    model = make({"depth": 1, "segments": 5})
    images = torch.rand(2, 3, 24, 40)
    outputs = model.eval()(images)
    for task, channels in {"depth": 1, "segments": 5}.items():
        twin = DENSE[make](weights=None, weights_backbone=None, num_classes=channels)
        twin.backbone, twin.classifier = model.backbone, model.heads[task]  # of which it has the same, by name
        torch.testing.assert_close(outputs[task], twin.eval()(images)["out"])
        assert outputs[task].shape == (2, channels, 24, 40)


@pytest.mark.parametrize("make", DENSE)
def test_dense_networks_keep_torchvisions_names_and_shapes(make):
    with torch.device("meta"):
        twin, model = DENSE[make](weights=None, weights_backbone=None, num_classes=4), make({"a": 4})
    theirs = {name.replace("classifier.", "heads.a."): value.shape for name, value in twin.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == theirs


def test_a_dense_network_on_images_of_two_channels():
    torch.manual_seed(0)
    model = fcn_resnet50({"a": 4}, in_channels=2)
    stem = model.backbone.conv1.weight
    assert stem.shape == (64, 2, 7, 7) and abs(stem.std() * (64 * 7 * 7 / 2) ** 0.5 - 1) < 0.05  # He et al., fan out
    assert model.eval()(torch.rand(1, 2, 16, 16))["a"].shape == (1, 4, 16, 16)


# Branched, a backbone computes what the original with each task's copies does.


def check_branched(make, shape, gradients):
    def without_dropout():
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    torch.manual_seed(0)
    images, model = torch.rand(shape).double(), without_dropout()
    layers = [layer.name for layer in find_layers(model) if not layer.name.startswith("heads.")]
    branched = recon.convert(model, recon.BranchPlan.per_task([layers[3], layers[-1]], ("a", "b")), images)
    oracle.perturb(branched)
    oracle.check(without_dropout, branched, images, gradients=gradients)


def test_vit_is_branched():
    check_branched(lambda: ViT({"a": 2, "b": 3}, image_size=8, layers=2), (2, 1, 8, 8), gradients=True)


@pytest.mark.parametrize("make", [pytest.param(fcn_resnet50, marks=pytest.mark.slow), deeplabv3_resnet50])
def test_dense_networks_are_branched(make):
    check_branched(lambda: make({"a": 2, "b": 1}), (2, 3, 16, 16), gradients=False)  # 40 million weights


def test_a_small_backbone_does_not_wait_for_torchvision():
    code = "import recon.models, sys; recon.models.SmallResNet; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"ResNet18", "SmallResNet", "fcn_resnet50"} <= set(dir(recon.models))
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
