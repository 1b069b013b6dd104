import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

import recon
from recon.errors import FanError
from recon.support.network.layers import find_layers
from tests import families, oracle
from tests.families import (
    COARSE,
    FAMILIES,
    HEADER,
    PLANS,
    Family,
    Figures,
    check_family,
    check_plan,
    disturb,
    main,
    settle,
)

PAGE = Path(__file__).parents[2] / "docs" / "method" / "verified_models.md"


def named(name: str) -> Family:
    family = FAMILIES[name]
    if family.library != "recon":
        pytest.importorskip(family.library)
    return family


# These take long, and others are built as they are; `make test-slow` has them.
ALIKE = {
    "inception_v3",  # googlenet
    "resnet50",  # resnet18, densenet121
    "mnasnet1_0",  # mobilenet_v3_small
    "mobilenet_v2",
    "tf_mobilenetv3_small_minimal_100",  # mobilenetv3_small_050
    "maxvit_rmlp_pico_rw_256",  # maxvit_t
    "fcn_resnet50",  # deeplabv3_resnet50
    "timm resnet, `features_only=True`",  # timm's resnetv2_50x1_bit, torchvision's create_feature_extractor
    "timm mobilenetv3, gradient checkpointing",  # mobilenetv3_small_050
    "mobilevit_xxs",  # levit_128s
    "lraspp_mobilenet_v3_large",  # deeplabv3_resnet50, mobilenet_v3_small
    "hrnet_w18_small",
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALIKE])
def test_a_plan_for_every_family(name):
    check_plan(named(name), *(PLANS[0], COARSE)[list(FAMILIES).index(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many_plans_both_precisions_and_the_full_size(name):
    figures = check_family(named(name))
    assert figures["small"].plans == len(PLANS)
    assert figures["small"].mixed_up > 1e-3  # with another task's copies, an output would be far off


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_users_verify_for_themselves(name):
    family, tasks = named(name), ("a", "b", "c")
    torch.manual_seed(0)
    model = family.make(tasks)
    settle(model.float(), tree_map(_single, family.inputs(4)))
    inputs = tree_map(_single, family.inputs(4))
    branched = recon.convert(model, oracle.random_plan(model, "one", 1, tasks), inputs, mode=family.mode)
    assert recon.verify(model, branched, inputs).modes == ("evaluation", "training")


def _single(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.fixture
def small_resnet():
    """Branched in its second stage, each copy with weights and statistics of its own."""
    family = FAMILIES["torchvision resnet, `create_feature_extractor`"]
    torch.manual_seed(0)
    model, inputs = family.make("ab").double(), family.inputs(4).double()
    settle(model, family.inputs(4).double())
    plan = recon.BranchPlan.per_task(["backbone.0.layer2.0.conv1"], "ab")
    branched = recon.convert(model, plan, inputs)
    disturb(branched, 0)
    return partial(copy.deepcopy, model), branched, inputs


@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_output_of_one_copy_is_noticed(small_resnet, training):
    make, branched, inputs = small_resnet
    Figures().check(make, branched.train(training), inputs, torch.float64)
    copy_of_b = branched.get_submodule("backbone.0.layer2.0.conv1.branches.b")
    copy_of_b.register_forward_hook(lambda module, args, out: out + 1e-6 * out.square())
    with pytest.raises(AssertionError, match="output of b"):
        Figures().check(make, branched, inputs, torch.float64)


def test_a_wrong_gradient_of_one_copy_is_noticed(small_resnet):
    make, branched, inputs = small_resnet
    branched.get_parameter("backbone.0.layer2.0.conv1.branches.b.weight").register_hook(lambda g: g * (1 + 1e-6))
    with pytest.raises(AssertionError, match=r"gradient of .*branches\.b\.weight"):
        Figures().check(make, branched, inputs, torch.float64)


def test_statistics_that_two_tasks_share_are_noticed(small_resnet):
    make, branched, inputs = small_resnet
    norm = branched.get_submodule("backbone.0.layer2.0.bn1")
    of_a, of_b = (norm.get_submodule(f"branches.{task}") for task in "ab")
    of_a._buffers = of_b._buffers
    with pytest.raises(AssertionError, match=r"buffer .*bn1\.running_mean of"):
        Figures().check(make, branched.train(), inputs, torch.float64)


@pytest.mark.parametrize(
    ("name", "layer", "statement"),
    [
        ("DETR", "backbone.input_projection", "if not torch.isfinite(hidden_states).all():"),
        ("Mixtral", "backbone.embed_tokens", "if expert_idx == self.num_experts:"),
    ],
)
def test_a_forward_that_decides_by_values_is_refused_with_the_statement(name, layer, statement):
    family = named(name)
    torch.manual_seed(0)
    model, inputs = family.make("ab"), family.inputs(4)
    settle(model, inputs)
    with pytest.raises(FanError, match=re.escape(statement) + r"(?s:.*)mode='per-task'"):
        recon.convert(model, recon.BranchPlan.per_task([layer], "ab"), inputs)


def test_detr_fans_out_in_its_decoder():
    family = named("DETR")
    torch.manual_seed(0)
    model, inputs = family.make("ab").double(), family.inputs(4)
    inputs = recon.inputs(pixel_values=inputs.kwargs["pixel_values"].double())
    settle(model, inputs)
    decoder = [layer.name for layer in find_layers(model) if ".decoder." in layer.name]
    branched = recon.convert(model, recon.BranchPlan.per_task(decoder, "ab"), inputs)
    disturb(branched, 0)
    for training in (True, False):
        Figures().check(partial(copy.deepcopy, model), branched.train(training), inputs, torch.float64)


# The page.


def test_the_page_lists_every_family():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert f"| {' | '.join(HEADER)} |" in rows
    listed = [row.split(" | ")[0].removeprefix("| ") for row in rows if row[2:].split(" | ")[0] not in ("model", "---")]
    assert listed == list(FAMILIES)
    assert not any("FAILED" in row for row in rows)


def test_the_command_prints_the_table(capsys):
    assert main(["segnet"]) == 0
    title, _, header, _, row = capsys.readouterr().out.strip().splitlines()
    assert title == "### Multi-task and other architectures" and header == f"| {' | '.join(HEADER)} |"
    assert row.startswith("| SegNet | ") and "FAILED" not in row


def test_the_command_tells_what_fails(capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the output of a")

    monkeypatch.setattr(families, "check_plan", fail)
    assert main(["segnet"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("| FAILED: the output of a |")
