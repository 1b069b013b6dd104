"""The model families that people use, each with a head per task, and what is checked of every one of them.

`python -m tests.families [part of a name ...]` checks them all, or those named, and prints the tables of
docs/method/verified_models.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux
from torchvision.models.inception import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

import recon
from recon.branching.plan import plan_of
from recon.errors import ReconError
from recon.support.network.forward import Inputs, call
from recon.support.network.layers import find_layers
from recon.support.tables import short_number
from tests import oracle, zoo

WIDTH = 8  # of what the backbones give
LETTERS = "abcde"

# Which layers, how many tasks, and a seed: an odd one gives every layer groups of its own, coarser than per task.
PLANS = [("quarter", 2, 0), ("all", 3, 1), ("one", 5, 3), ("first", 3, 2), ("last", 5, 1)]
COARSE = ("quarter", 3, 1)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Family:
    """One kind of model, with what it needs to be tried on.

    Args:
        name: as in the table.
        library: where it comes from.
        build: makes the backbone, narrow or shallow: all plans are tried on it.
        inputs: draws a batch of a given size.
        features: makes one tensor or several out of what the backbone returns, features last.
        full: makes it at its usual width and depth, for one plan; with inputs of its own.
        own_heads: `build` makes a whole multi-task model, for a, b and c.
        draws: it draws random numbers in training, so only evaluation mode can be compared.
        singles: it computes some parts in float32 whatever the precision of its weights.
        mode: of the conversion.
        note: what is special about it.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    features: Callable[[Any], Any] = lambda out: out
    full: Callable[[], nn.Module] | None = None
    full_inputs: Callable[[int], Any] | None = None
    own_heads: bool = False
    draws: bool = False
    singles: bool = False
    mode: str = "fan"
    note: str = ""

    def make(self, tasks: Sequence[str], full: bool = False) -> nn.Module:
        backbone = self.full() if full and self.full else self.build()
        if self.own_heads:
            return backbone
        return MultiTask(backbone if self.draws else without_dropout(backbone), self.features, tasks)


class MultiTask(nn.Module):
    """A backbone with a linear layer per task on its features: on each of them, where it gives several."""

    def __init__(self, backbone: nn.Module, features: Callable[[Any], Any], tasks: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = features
        self.heads = nn.ModuleDict({task: nn.LazyLinear(2) for task in tasks})

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if args and isinstance(args[0], Inputs):  # the oracle gives every model one argument
            args, kwargs = args[0]
        features = self.features(self.backbone(*args, **kwargs))
        return {task: tree_map(head, features) for task, head in self.heads.items()}


def without_dropout(model: nn.Module) -> nn.Module:
    """No random numbers in training: a plain network would draw others than the branched one."""
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


# The checks.


@dataclass
class Figures:
    """What was measured of a family, over all plans.

    Args:
        layers: of the model with most heads.
        size: its parameters.
        plans: how many were tried.
        apart: the largest relative difference in outputs, gradients and buffers.
        mixed_up: the control, the smallest relative change of an output if a task got another task's copies.
    """

    layers: int = 0
    size: int = 0
    plans: int = 0
    apart: dict[str, float] = field(default_factory=dict)
    mixed_up: float = math.inf

    def add(self, other: Figures) -> None:
        self.layers = max(self.layers, other.layers)
        self.size = max(self.size, other.size)
        self.plans += other.plans
        self.mixed_up = min(self.mixed_up, other.mixed_up)
        for kind, difference in other.apart.items():
            self.apart[kind] = max(self.apart.get(kind, 0.0), difference)

    def check(self, make: Callable[[], nn.Module], branched: nn.Module, inputs: Any, dtype: torch.dtype) -> None:
        """`oracle.check`, noting down how far apart what it compares is.

        Gradients are measured against the largest entry of any: some are zero but for rounding.
        """
        largest: dict[str, float] = {}
        apart: dict[str, float] = {}

        def compare(actual: Tensor, expected: Tensor, what: str) -> None:
            assert_close(actual, expected, what, TOLERANCE[dtype] if dtype == torch.float64 else math.inf)
            if expected.is_floating_point() and expected.numel():
                key = "gradient" if what.startswith("gradient") else what
                largest[key] = max(largest.get(key, 0.0), expected.detach().abs().max().item())
                apart[key] = max(apart.get(key, 0.0), (actual - expected).detach().abs().max().item())

        assert_close = oracle.assert_close
        with mock.patch.object(oracle, "assert_close", compare):
            oracle.check(make, branched, inputs)
        for key, difference in apart.items():
            relative = difference / (largest[key] or 1.0)
            assert relative <= TOLERANCE[dtype], f"{key} differs by {relative:.3g} of its largest entry"
            self.add(Figures(apart={key.split()[0]: relative}))


def check_plan(
    family: Family, kind: str, count: int, seed: int, *, full: bool = False, dtype: torch.dtype = torch.float64
) -> Figures:
    """Everything that a branched model must be, for one plan."""
    torch.manual_seed(seed)
    tasks = zoo.TASKS if family.own_heads else tuple(LETTERS[:count])
    batch = partial(_batch, (full and family.full_inputs) or family.inputs, dtype)
    model = family.make(tasks, full).to(dtype)
    settle(model, batch(4))
    inputs = batch(2 if full else 4)
    before = oracle.snapshot(model)
    branched = recon.convert(model, oracle.random_plan(model, kind, seed, tasks), inputs, mode=family.mode)
    oracle.assert_untouched(model, before)
    figures = Figures(len(find_layers(model)), sum(p.numel() for p in model.parameters()), 1)
    modes = (False,) if family.draws else (False, True)
    for training in modes:
        assert_same_bits(branched.train(training), model.train(training), inputs)
    make = partial(copy.deepcopy, model)
    with in_double(family.singles and dtype == torch.float64):
        for steps in (0,) if full else (0, 3):
            disturb(branched, seed + steps)
            train(branched, [batch(4) for _ in range(steps)])
            settle(branched, batch(4))
            for training in modes:
                figures.check(make, branched.train(training), inputs, dtype)
        oracle.assert_no_crosstalk(branched, inputs)
    if kind == "all":
        figures.mixed_up = mixed_up(make, branched, inputs)
    assert_taken_out(make, branched, inputs)
    branched.load_state_dict(model.state_dict())
    assert_same_bits(branched.eval(), model.eval(), inputs)
    return figures


def _batch(draw: Callable[[int], Any], dtype: torch.dtype, size: int) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, draw(size))


@torch.no_grad()
def settle(model: nn.Module, inputs: Any) -> None:
    """Give the norms statistics of real values: with fresh ones, deep networks' signals die out in evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    call(model.train(), inputs)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def disturb(model: nn.Module, seed: int) -> None:
    """Change every number by a tenth of its size, so that no two copies are equal and no signal dies or explodes."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    for state in model.state_dict().values():
        if isinstance(state, Tensor) and state.is_floating_point():
            noise = torch.rand(state.shape, generator=generator, dtype=torch.float64).to(state.dtype)
            if state.data_ptr() in parameters:
                state.add_((0.2 * state.square().mean().sqrt() + 1e-3) * (2 * noise - 1))
            else:
                state.mul_(1 + 0.1 * noise)  # variances stay positive


def train(branched: nn.Module, batches: Sequence[Any]) -> None:
    """A step of gradient descent on each batch."""
    optimizer = torch.optim.SGD(branched.parameters(), lr=1e-3, momentum=0.9)
    branched.train()
    for inputs in batches:
        optimizer.zero_grad()
        outputs = call(branched, inputs)
        sum(oracle.loss_of(output, task) for task, output in outputs.items()).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in branched.parameters())


@contextmanager
def in_double(wanted: bool) -> Iterator[None]:
    """Let models that ask for float32 by name have float64: their own rounding would hide what is compared."""
    if not wanted:
        yield
        return
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(Tensor, "float", Tensor.double):
        yield


def assert_same_bits(branched: nn.Module, model: nn.Module, inputs: Any) -> None:
    """Copied weights: the outputs are the model's own."""
    ours, theirs = call(branched, copy.deepcopy(inputs)), call(model, copy.deepcopy(inputs))
    for task, output in ours.items():
        assert_equal(output, theirs[task], f"the output of {task}")


def assert_taken_out(make: Callable[[], nn.Module], branched: nn.Module, inputs: Any) -> None:
    """One task's plain network loads into the user's own class and gives that task's output."""
    *_, task = plan_of(branched).tasks
    plain = make()
    plain.load_state_dict(recon.extract_task(branched, task).state_dict())
    assert_equal(call(plain.eval(), inputs)[task], call(branched.eval(), inputs)[task], f"{task}'s plain network")


def assert_equal(ours: Any, theirs: Any, what: str) -> None:
    for one, other in zip(oracle.tensors_in(ours), oracle.tensors_in(theirs), strict=True):
        assert torch.equal(one, other), what


@torch.no_grad()
def mixed_up(make: Callable[[], nn.Module], branched: nn.Module, inputs: Any) -> float:
    """By how much a task's output changes, relative to its largest entry, with another task's copies."""
    task, *_, other = plan_of(branched).tasks
    plains = [oracle.plain_model(make, branched.eval(), name) for name in (task, other)]
    right, wrong = (oracle.tensors_in(call(plain, inputs)[task]) for plain in plains)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(right, wrong, strict=True))


def check_family(family: Family) -> dict[str, Figures]:
    """All plans on the narrow one, one of them in float32 too, and one on the architecture at its usual size."""
    figures = {"small": Figures()}
    for plan in PLANS:
        figures["small"].add(check_plan(family, *plan))
    figures["float32"] = check_plan(family, *COARSE, dtype=torch.float32)
    if family.full:
        figures["full"] = check_plan(family, *PLANS[0], full=True)
    return figures


# What goes in, and what is made of what comes out.


def images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


def pixels(size: int) -> Callable[[int], Inputs]:
    return lambda batch: recon.inputs(pixel_values=torch.randn(batch, 3, size, size))


def text(batch: int, **more: Any) -> Inputs:
    """Token ids with an attention mask; every other text is padded."""
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[1::2, 5:] = 0
    return recon.inputs(input_ids=torch.randint(3, 60, (batch, 9)), attention_mask=mask, **more)


def two_texts(batch: int) -> Inputs:
    return text(batch, decoder_input_ids=torch.randint(3, 60, (batch, 5)))


def labelled_text(batch: int) -> Inputs:
    return text(batch, labels=torch.randint(3, 60, (batch, 9)))


def text_and_pixels(batch: int) -> Inputs:
    return text(batch, pixel_values=torch.randn(batch, 3, 16, 16))


def sound(batch: int) -> Inputs:
    return recon.inputs(input_values=torch.randn(batch, 200))


def spectrum(batch: int) -> Inputs:
    return recon.inputs(input_features=torch.randn(batch, 8, 20), decoder_input_ids=torch.randint(3, 60, (batch, 5)))


def read(out: Any) -> Any:
    """Of a vision model: one tensor or several (in a dict, list or NamedTuple), feature maps with channels last."""
    if isinstance(out, Tensor):
        return out.movedim(1, -1) if out.dim() == 4 else out  # a linear layer is a 1x1 convolution then
    parts = out.values() if isinstance(out, dict) else out
    return tuple(read(part) for part in parts if part is not None)


def tokens(out: Any) -> Tensor:
    return out.last_hidden_state


def pooled(out: Any) -> Tensor:
    return out.pooler_output.flatten(1)


def everything(out: Any) -> Any:
    """What `output_hidden_states=True, output_attentions=True` adds."""
    weights = sum(layer.mean() for layer in out.attentions)
    return (out.pooler_output + weights, *out.hidden_states)


def loss_and_logits(out: Any) -> Tensor:
    return out.logits + out.loss


def dense(out: Any) -> Tensor:
    return out.predicted_depth[..., None] if "predicted_depth" in out else out.logits.movedim(1, -1)


def embeddings(out: Any) -> Tensor:
    return out.image_embeds + out.text_embeds


# The families.


def torchvision_model(name: str, **options: Any) -> nn.Module:
    return models.get_model(name, weights=None, **{"num_classes": WIDTH, **options})


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **{"num_classes": 0, **options})


def transformers_model(name: str, model: str = "Model", dropout: bool = False, **options: Any) -> nn.Module:
    """`name` is that of the config class."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float) and not dropout:
            setattr(config, key, 0.0)
    return getattr(transformers, name + model)(config)


def _torchvision(
    name: str,
    build: Callable[[], nn.Module] | None = None,
    size: int = 32,
    full_size: int = 64,
    note: str = "",
    **options: Any,
) -> Family:
    full = partial(torchvision_model, name, **options)
    return Family(name, "torchvision", build or full, images(size), read, full, images(full_size), note=note)


def _timm(
    name: str,
    build: Callable[[], nn.Module] | None = None,
    size: int = 64,
    full_size: int = 64,
    note: str = "",
    **options: Any,
) -> Family:
    """`options` are those of the small one."""
    sized = {"img_size": full_size} if "img_size" in options else {}
    small, full = build or partial(timm_model, name, **options), partial(timm_model, name, **sized)
    return Family(name, "timm", small, images(size), read, full, images(full_size), note=note)


def _transformers(
    title: str, inputs: Callable[[int], Any], features: Callable[[Any], Any], *names: str, **options: Any
) -> Family:
    ours = {key: options.pop(key) for key in ("draws", "mode", "note", "singles") if key in options}
    return Family(title, "transformers", partial(transformers_model, *names, **options), inputs, features, **ours)


def _own(name: str, title: str, note: str = "") -> Family:
    return Family(title, "recon", zoo.ZOO[name].make, zoo.ZOO[name].inputs, own_heads=True, note=note)


def shallow_resnet(**options: Any) -> nn.Module:
    return models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=WIDTH, width_per_group=8, **options)


class PooledMaps(nn.Module):
    """One vector of all the maps of a pyramid."""

    def forward(self, maps: Any) -> Tensor:
        maps = maps.values() if isinstance(maps, dict) else maps
        return torch.cat([one.mean((2, 3)) for one in maps], 1)


class Slim(Bottleneck):
    expansion = 1


def dilated_resnet() -> nn.Module:
    resnet = models.ResNet(Slim, [1, 1, 1, 1], width_per_group=8, replace_stride_with_dilation=[False, True, True])
    return IntermediateLayerGetter(resnet, {"layer4": "out", "layer3": "aux"})


def small_fcn() -> nn.Module:
    return FCN(dilated_resnet(), FCNHead(512, WIDTH), FCNHead(256, WIDTH))


def small_deeplab() -> nn.Module:
    head = nn.Sequential(ASPP(512, [2, 4], 16), nn.Conv2d(16, WIDTH, 1))
    return DeepLabV3(dilated_resnet(), head, FCNHead(256, WIDTH))


def small_lraspp() -> nn.Module:
    mobilenet = models.mobilenet_v3_large(dilated=True, width_mult=0.35)
    return LRASPP(IntermediateLayerGetter(mobilenet.features, {"4": "low", "16": "high"}), 16, 336, WIDTH, 16)


def small_efficientnet(drop: float = 0.0) -> nn.Module:
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(6, 3, 2, 8, 12, 2), MBConvConfig(6, 5, 2, 12, 16, 2)]
    return models.EfficientNet(blocks, drop, stochastic_depth_prob=drop, num_classes=WIDTH)


def small_regnet() -> nn.Module:
    blocks = BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return models.RegNet(blocks, num_classes=WIDTH, stem_width=8)


def small_convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=WIDTH)


def small_maxvit() -> nn.Module:
    return models.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], head_dim=4, stochastic_depth_prob=0.0, num_classes=WIDTH)


def small_mixer() -> nn.Module:
    import timm

    return timm.models.MlpMixer(num_classes=0, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)


def small_hrnet() -> nn.Module:
    from timm.models import hrnet

    config = copy.deepcopy(hrnet.cfg_cls["hrnet_w18_small"])
    for stage in ("stage2", "stage3", "stage4"):
        config[stage]["num_channels"] = [8, 8, 16, 16][: config[stage]["num_branches"]]
        config[stage]["num_blocks"] = [1] * config[stage]["num_branches"]
    return nn.Sequential(hrnet.HighResolutionNetFeatures(config, feature_location=""), PooledMaps())


def small_repvgg() -> nn.Module:
    from timm.models import byobnet

    blocks = byobnet._rep_vgg_bcfg(d=(1, 1, 1, 1), wf=(0.25, 0.25, 0.25, 0.25))
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=0)


def small_bit() -> nn.Module:
    from timm.layers import StdConv2d
    from timm.models import resnetv2

    sizes = {"layers": [1, 1], "channels": [128, 256], "stem_chs": 32}
    return resnetv2.ResNetV2(**sizes, num_classes=0, stem_type="fixed", conv_layer=partial(StdConv2d, eps=1e-8))


class GroupedConv(BasicConv2d):
    """Both GoogLeNet and Inception have fixed widths; this makes them light."""

    def __init__(self, width_in: int, width_out: int, **options: Any) -> None:
        super().__init__(width_in, width_out, groups=math.gcd(width_in, width_out, 16), **options)


def grouped(*blocks: type[nn.Module]) -> list[Callable[..., nn.Module]]:
    return [GroupedConv, *(partial(block, conv_block=GroupedConv) for block in blocks)]


def small_googlenet() -> nn.Module:
    return models.GoogLeNet(WIDTH, init_weights=False, blocks=grouped(Inception, InceptionAux))


def small_inception() -> nn.Module:
    blocks = grouped(InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, nn.Identity)
    return models.Inception3(WIDTH, aux_logits=False, init_weights=False, inception_blocks=blocks)


_AUXILIARY = {"aux_logits": True, "init_weights": False}
_NAMED_TUPLE = "auxiliary classifiers: a NamedTuple in training"
_DENSE = {"weights_backbone": None, "note": "dense outputs"}

TORCHVISION = [
    _torchvision("resnet18", lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=WIDTH)),
    _torchvision("resnet50", shallow_resnet),
    _torchvision("mobilenet_v2", lambda: models.MobileNetV2(WIDTH, width_mult=0.25)),
    _torchvision("mobilenet_v3_small", partial(torchvision_model, "mobilenet_v3_small", width_mult=0.35)),
    _torchvision("efficientnet_b0", small_efficientnet),
    _torchvision("densenet121", lambda: models.DenseNet(8, (2, 2, 2, 2), 8, num_classes=WIDTH)),
    _torchvision("googlenet", small_googlenet, note=_NAMED_TUPLE, **_AUXILIARY),
    _torchvision("inception_v3", small_inception, 75, 299, f"{_NAMED_TUPLE} (at full size)", **_AUXILIARY),
    _torchvision("convnext_tiny", small_convnext),
    _torchvision("regnet_y_400mf", small_regnet),
    _torchvision("shufflenet_v2_x1_0", lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], WIDTH)),
    _torchvision("squeezenet1_0"),
    _torchvision("mnasnet1_0", lambda: models.MNASNet(0.35, WIDTH)),
    _torchvision("vit_b_16", lambda: models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=WIDTH), image_size=64),
    _torchvision("swin_t", lambda: models.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=WIDTH)),
    _torchvision("maxvit_t", small_maxvit, full_size=224),
    _torchvision("fcn_resnet50", small_fcn, aux_loss=True, **_DENSE),
    _torchvision("deeplabv3_resnet50", small_deeplab, aux_loss=True, **_DENSE),
    _torchvision("lraspp_mobilenet_v3_large", small_lraspp, **_DENSE),
]
TIMM = [
    _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    _timm("mobilenetv3_small_050", size=32),
    _timm("tf_mobilenetv3_small_minimal_100", size=32, note="TensorFlow's padding"),
    _timm("vit_tiny_patch16_224", size=32, img_size=32, depth=2, embed_dim=24, num_heads=2),
    _timm("deit_tiny_distilled_patch16_224", size=32, img_size=32, depth=2, embed_dim=24, num_heads=2),
    _timm("swin_tiny_patch4_window7_224", None, 56, 224, img_size=56, depths=(2, 2), embed_dim=12, num_heads=(2, 2)),
    _timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=8),
    _timm("mixer_s32_224", small_mixer, 32, img_size=64),
    _timm("levit_128s", img_size=64, embed_dim=(16, 24, 32), num_heads=(2, 2, 2), depth=(1, 1, 1), key_dim=8),
    _timm("hrnet_w18_small", small_hrnet, 32, note="has modules of its own named `branches`"),
    _timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 20, 32)),
    _timm("xcit_nano_12_p16_224", depth=1, embed_dim=16, num_heads=2),
    _timm("eva02_tiny_patch14_224", None, 28, 56, img_size=28, depth=2, embed_dim=24, num_heads=2),
    _timm("repvgg_a0", small_repvgg, 32),
    _timm("mobilevit_xxs", size=32),
    _timm("resnetv2_50x1_bit", small_bit, 32, note="standardises its weights"),
]

_TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TINY["initializer_range"] = 0.2  # the usual 0.02 is for wide layers: a narrow network would hardly have a signal
_TEXT = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **_TINY}
_IMAGE = {"image_size": 16, "patch_size": 8, **_TINY}
_EAGER = {"attn_implementation": "eager"}
_SDPA = {"attn_implementation": "sdpa"}
_STATES = {"output_hidden_states": True, "output_attentions": True}
_GPT2 = {
    "vocab_size": 60, "n_embd": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_T5 = {"vocab_size": 60, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_ENCODER_DECODER = {
    "vocab_size": 60, "d_model": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "init_std": 0.2,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "decoder_start_token_id": 1,
}  # fmt: skip
_WAV2VEC2 = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip
_SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "mlp_ratios": [2, 2],
    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "decoder_hidden_size": 16,
    "initializer_range": 0.2,
}  # fmt: skip
_DPT = {
    **_TINY, "image_size": 16, "patch_size": 4, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "use_auxiliary_head": False,
}  # fmt: skip
_DISTIL = {"vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.2}

TRANSFORMERS = [
    _transformers("BERT", text, pooled, "Bert", **_TEXT, **_SDPA),
    _transformers("BERT, eager attention", text, everything, "Bert", **_TEXT, **_EAGER, **_STATES, note="all states"),
    _transformers("BERT, masked language", labelled_text, loss_and_logits, "Bert", "ForMaskedLM", **_TEXT, **_SDPA),
    _transformers("DistilBERT", text, tokens, "DistilBert", **_DISTIL),
    _transformers("RoBERTa", text, pooled, "Roberta", **_TEXT),
    _transformers("ALBERT", text, pooled, "Albert", embedding_size=12, **_TEXT, note="one block's weights for all"),
    _transformers("DeBERTa-v2", text, tokens, "DebertaV2", **_TEXT, **_EAGER, relative_attention=True),
    _transformers("ModernBERT", text, tokens, "ModernBert", **_TEXT, cls_token_id=1, sep_token_id=2, singles=True),
    _transformers("GPT-2", text, tokens, "GPT2", **_GPT2),
    _transformers("Llama", text, tokens, "Llama", **_TEXT, num_key_value_heads=1, singles=True),
    _transformers("T5", two_texts, tokens, "T5", **_T5, singles=True),
    _transformers("BART", text, tokens, "Bart", **_ENCODER_DECODER),
    _transformers("ViT", pixels(16), pooled, "ViT", **_IMAGE, **_SDPA),
    _transformers("ViT, eager attention", pixels(16), pooled, "ViT", **_IMAGE, **_EAGER, singles=True),
    _transformers("DINOv2", pixels(16), pooled, "Dinov2", **_IMAGE),
    _transformers("SegFormer", pixels(32), dense, "Segformer", "ForSemanticSegmentation", **_SEGFORMER),
    _transformers("DPT", pixels(16), dense, "DPT", "ForDepthEstimation", **_DPT),
    _transformers("CLIP", text_and_pixels, embeddings, "CLIP", text_config=_TEXT, vision_config=_IMAGE),
    _transformers("Wav2Vec2", sound, tokens, "Wav2Vec2", **_TEXT, **_WAV2VEC2),
    _transformers("Whisper", spectrum, tokens, "Whisper", **_ENCODER_DECODER, num_mel_bins=8, max_source_positions=10),
]

OWN = [
    _own("SegNet", "SegNet", "max-unpooling with the encoder's indices"),
    _own("MTAN", "MTAN", "an attention mask per task"),
    _own("UNet", "U-Net"),
    _own("Recurrent", "LSTM and GRU encoder"),
    _own("TransformerEncoder", "Transformer encoder"),
]


def frozen_pyramid() -> nn.Module:
    """As detection models take it: the norms and the first stage frozen."""
    resnet = models.ResNet(Slim, [1, 1, 1, 1], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    for part in (resnet.conv1, resnet.layer1):
        part.requires_grad_(False)
    stages = {f"layer{number}": str(number) for number in (2, 3, 4)}
    return nn.Sequential(BackboneWithFPN(resnet, stages, [128, 256, 512], out_channels=16), PooledMaps())


def traced_resnet() -> nn.Module:
    resnet = models.ResNet(Slim, [1, 1, 1, 1], width_per_group=8)
    return nn.Sequential(create_feature_extractor(resnet, ["layer2", "layer4"]), PooledMaps())


def channels_last_resnet() -> nn.Module:
    return models.ResNet(Slim, [1, 1, 1, 1], width_per_group=8, num_classes=WIDTH).to(memory_format=torch.channels_last)


def checkpointed_densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2), 8, num_classes=WIDTH, memory_efficient=True)


def timm_pyramid() -> nn.Module:
    return nn.Sequential(timm_model("resnet10t", features_only=True), PooledMaps())


def checkpointed(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    model.set_grad_checkpointing()
    return model


def half_frozen_bert() -> nn.Module:
    model = transformers_model("Bert", **_TEXT)
    for part in (model.embeddings, model.encoder.layer[0]):
        part.requires_grad_(False)
    return model


def checkpointed_bert() -> nn.Module:
    model = transformers_model("Bert", use_cache=False, **_TEXT)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # older
    enable({"use_reentrant": False})
    return model


def tiny_detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    options = {
        name: value for name, value in _ENCODER_DECODER.items() if name.startswith(("d_", "encoder", "decoder_"))
    }
    return transformers_model("Detr", backbone_config=backbone, num_queries=5, **options, **_EAGER)


_SMALL_VIT = partial(timm_model, "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
_SMALL_MOBILENET = partial(timm_model, "mobilenetv3_small_050")
_MIXTRAL = {"num_key_value_heads": 1, "num_local_experts": 3, "experts_implementation": "eager"}

VARIATIONS = [
    Family("torchvision resnet + FPN, frozen norms and first stage", "torchvision", frozen_pyramid, images(64)),
    Family(
        "torchvision resnet, `create_feature_extractor`",
        "torchvision",
        traced_resnet,
        images(32),
        note="a torch.fx graph",
    ),
    Family("torchvision resnet, channels last", "torchvision", channels_last_resnet, images(32)),
    Family("torchvision densenet, `memory_efficient=True`", "torchvision", checkpointed_densenet, images(32)),
    Family(
        "torchvision efficientnet, dropout", "torchvision", partial(small_efficientnet, 0.2), images(32), draws=True
    ),
    Family("timm resnet, `features_only=True`", "timm", timm_pyramid, images(32)),
    Family("timm vit, dropout", "timm", partial(_SMALL_VIT, drop_path_rate=0.2, drop_rate=0.1), images(32), draws=True),
    Family("timm vit, gradient checkpointing", "timm", partial(checkpointed, _SMALL_VIT), images(32)),
    Family("timm mobilenetv3, gradient checkpointing", "timm", partial(checkpointed, _SMALL_MOBILENET), images(32)),
    _transformers("BERT, dropout", text, pooled, "Bert", "Model", True, **_TEXT, draws=True),
    _transformers("BERT, `return_dict=False`", text, lambda out: out[1], "Bert", **_TEXT, return_dict=False),
    Family("BERT, embeddings and first layer frozen", "transformers", half_frozen_bert, text, pooled),
    Family("BERT, gradient checkpointing", "transformers", checkpointed_bert, text, pooled),
]
# Their forwards decide by values in Python: convert refuses to fan out before that, and says so.
PER_TASK = [
    Family("DETR", "transformers", tiny_detr, pixels(32), tokens, mode="per-task", note="`if not isfinite(...).all()`"),
    _transformers("Mixtral", text, tokens, "Mixtral", **_TEXT, **_MIXTRAL, mode="per-task", note="picks its experts"),
]

SECTIONS = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "Multi-task and other architectures": OWN,
    "In other circumstances": VARIATIONS,
    'With `mode="per-task"`': PER_TASK,
}
FAMILIES = {family.name: family for section in SECTIONS.values() for family in section}


# The tables.

HEADER = ["model", "layers", "outputs", "gradients", "buffers", "control", "in float32", "full size", ""]


def row(family: Family, figures: dict[str, Figures]) -> list[str]:
    small, single, full = figures["small"], figures["float32"], figures.get("full")
    notes = [family.note] if family.note else []
    notes += ["compared in evaluation mode"] if family.draws else []
    notes += ["given float64 where it asks for float32"] if family.singles else []
    return [
        f"{family.name}",
        str(small.layers),
        _largest(small, "output"),
        _largest(small, "gradient"),
        _largest(small, "buffer"),
        f"{small.mixed_up:.0%}",
        _largest(single),
        f"{short_number(full.size)}: {_largest(full)}" if full else "",
        "; ".join(notes),
    ]


def _largest(figures: Figures, *kinds: str) -> str:
    """The largest difference of these kinds, or of any."""
    found = [figures.apart[kind] for kind in kinds or figures.apart if kind in figures.apart]
    return "" if not found else f"{max(found):.0e}" if max(found) else "0"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADER, ["---"] * len(HEADER), *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of those to check; all, if none is given")
    names = parser.parse_args(arguments).names
    torch.set_num_threads(1)
    failed = False
    for title, section in SECTIONS.items():
        rows = []
        for family in section:
            if names and not any(name.lower() in family.name.lower() for name in names):
                continue
            start = time.process_time()
            try:
                rows.append(row(family, check_family(family)))
            except (AssertionError, ReconError) as error:
                rows.append([family.name, *[""] * (len(HEADER) - 2), f"FAILED: {error}"])
                failed = True
            print(f"{family.name}: {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
        if rows:
            print(f"\n### {title}\n\n{markdown(rows)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
