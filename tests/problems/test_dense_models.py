import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recon
from recon.models import MTAN, SegNet
from recon.support.network.layers import find_layers
from tests.oracle import assert_no_crosstalk, check, perturb, random_groups, random_plan

TASKS = {"a": 4, "b": 1, "c": 3}
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published-maps"
BACKBONES = pytest.mark.parametrize("backbone", [SegNet, MTAN])


def small(backbone):
    torch.manual_seed(0)
    return backbone(TASKS, width=2).double()


def images(size=(32, 64)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shared_layers(model):
    own = ("heads.", "encoder_att.", "decoder_att.")
    return [layer.name for layer in find_layers(model) if not layer.name.startswith(own)]


# The networks of the papers.


def test_segnet_is_as_large_as_the_published_single_task_network():
    # 24,981,069 with 13 classes: the number that github.com/lorenmt/mtan divides the sizes of its networks by.
    assert sum(parameter.numel() for parameter in SegNet({"segmentation": 13}).parameters()) == 24_981_069


def test_mtan_has_1_77_times_the_parameters_of_segnet():
    tasks = {"segmentation": 13, "depth": 1, "normals": 3}  # Liu et al. 2019, Table 2
    assert sum(parameter.numel() for parameter in MTAN(tasks).parameters()) / 24_981_069 == pytest.approx(
        1.77, abs=5e-3
    )


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published scores in ../shared/data")
@pytest.mark.parametrize(
    ("backbone", "file"), [(SegNet, "cityscapes-segnet-S0.0.json"), (MTAN, "nyuv2-mtan-S-0.02.json")]
)
def test_the_published_scores_are_of_the_shared_layers(backbone, file):
    assert set(shared_layers(small(backbone))) == set(json.loads((PUBLISHED / file).read_text()))


@BACKBONES
def test_convolutions_start_as_xavier_s_and_norms_as_pytorch_s(backbone):
    for module in backbone(TASKS, width=16).modules():
        if isinstance(module, nn.Conv2d):
            assert not module.bias.any()
            if module.weight.numel() > 10_000:
                fan_in, fan_out = (channels * module.weight[0, 0].numel() for channels in module.weight.shape[1::-1])
                assert module.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()


def reference_trunk(model, x):
    """SegNet's trunk as its paper draws it: encoder features, pooled features, unpooled and decoder features."""
    pool, unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
    firsts, lasts, places, unpooled, decoded = [], [], [], {}, {}
    for level in range(5):
        firsts.append(model.encoder_block[level](x))
        lasts.append(model.conv_block_enc[level](firsts[-1]))
        x, where = pool(lasts[-1])
        places.append(where)
    for level in (4, 3, 2, 1, 0):
        unpooled[level] = unpool(x, places[level])
        x = decoded[level] = model.conv_block_dec[level](model.decoder_block[level](unpooled[level]))
    return firsts, lasts, unpooled, decoded


def test_segnet_s_heads_see_the_end_of_the_decoder():
    model, x = small(SegNet), images()
    *_, decoded = reference_trunk(model, x)
    for task, output in model(x).items():
        torch.testing.assert_close(output, model.heads[task](decoded[0]))


def test_mtan_masks_every_stage_for_each_task():
    model, x = small(MTAN), images()
    perturb(model)
    firsts, lasts, unpooled, decoded = reference_trunk(model, x)
    for task, output in model(x).items():
        for level in range(5):
            seen = firsts[0] if level == 0 else torch.cat([firsts[level], taken], 1)  # noqa: F821
            mask = model.encoder_att[task][level](seen)
            assert mask.min() >= 0 and mask.max() <= 1
            taken = F.max_pool2d(model.encoder_block_att[level](mask * lasts[level]), 2, 2)
        for level in (4, 3, 2, 1, 0):
            larger = F.interpolate(taken, scale_factor=2, mode="bilinear", align_corners=True)
            carried = model.decoder_block_att[level](larger)
            taken = model.decoder_att[task][level](torch.cat([unpooled[level], carried], 1)) * decoded[level]
        torch.testing.assert_close(output, model.heads[task](taken))


@BACKBONES
@pytest.mark.parametrize("size", [(32, 64), (45, 70)], ids=["halves evenly", "does not"])
def test_an_output_as_large_as_the_image_for_each_task(backbone, size):
    outputs = backbone(TASKS, in_channels=1, width=2)(torch.randn(2, 1, *size))
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        task: (2, channels, *size) for task, channels in TASKS.items()
    }


@BACKBONES
def test_every_parameter_but_those_of_other_tasks_serves_a_task(backbone):
    model = small(backbone)
    model(images())["a"].square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    own = {"heads", "encoder_att", "decoder_att"}
    assert idle == {name for name, _ in model.named_parameters() if name.split(".")[0] in own and ".a." not in name}


# Branching.


@BACKBONES
@pytest.mark.parametrize("count", [1, 5, 20, None])
def test_branched_they_agree_with_the_oracle(backbone, count):
    model, x = small(backbone), images()
    if count is None:
        plan = random_plan(model, "all", seed=0)
    else:  # each layer into groups of its own
        draw = random.Random(count)
        layers = draw.sample(shared_layers(model), count)
        plan = recon.BranchPlan.grouped({name: random_groups(tuple(TASKS), draw) for name in layers}, tuple(TASKS))
    branched = recon.convert(model, plan, x)
    perturb(branched)
    for training in (True, False):
        check(lambda: small(backbone), branched.train(training), x)
    assert_no_crosstalk(branched, x)


@BACKBONES
def test_profiled_the_shared_layers_are_found(backbone):
    model, x = small(backbone), images()
    losses = {task: lambda output, target: (output - target).square().mean() for task in TASKS}
    batch = x, {task: torch.ones(2, channels, 32, 64, dtype=x.dtype) for task, channels in TASKS.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cmap = recon.profile(model, [batch], losses, optimizer=optimizer, epochs=1)
    assert set(cmap.ranking()) == set(shared_layers(model))
    plan = recon.plan(cmap, model, top_k=3)
    assert recon.verify(model, recon.convert(model, plan, x), x)


@BACKBONES
def test_costs_grow_from_the_branch_point_on(backbone):
    model, x = small(backbone), images()
    plans = (["decoder_block.0.conv1"], ["encoder_block.0.conv1"], shared_layers(model))
    plans = [recon.BranchPlan.per_task(names, tuple(TASKS)) for names in plans]
    late, early, every = [recon.costs(model, plan, x) for plan in plans]
    assert recon.costs(model, None, x).macs < late.macs < early.macs == every.macs
    measured = recon.costs(recon.convert(model, plans[0], x), None, x)
    assert not late.measured and (late.parameters, late.macs) == (measured.parameters, measured.macs)
