"""A zoo of awkward multi-task models, one trap each: `forward(x) -> {task: tensor}` for tasks a, b and c."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from recon.support.network.forward import Inputs, inputs

TASKS = ("a", "b", "c")


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `draws` marks a model that draws random numbers in training, which then differ from those of the oracle.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    draws: bool = False


ZOO: dict[str, Entry] = {}


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def vector(batch: int) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64)


def sequence(batch: int) -> Tensor:
    return torch.randn(batch, 5, 6, dtype=torch.float64)


def tokens(batch: int) -> Tensor:
    return torch.randint(7, (batch, 5))


def entry(inputs: Callable[[int], Any], draws: bool = False) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(cls: type[nn.Module]) -> type[nn.Module]:
        ZOO[cls.__name__] = Entry(cls.__name__, lambda: cls().double(), inputs, draws)
        return cls

    return register


def conv_bn(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU())


class Heads(nn.Module):
    """One linear layer per task, after average pooling where there is something to pool."""

    def __init__(self, width: int, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.dim() == 4:
            x = x.mean((2, 3))
        return {task: head(x) for task, head in self.heads.items()}


class Trunk(nn.Module):
    """Most models here: a first layer, the trap, and the heads."""

    def __init__(self, first: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.first = first
        self.heads = Heads(width)

    def trap(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.trap(self.first(x)))


# Ways to write the forward.


@entry(image)
class PlainConv(nn.Module):
    def __init__(self, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 4), conv_bn(4, 4), nn.MaxPool2d(2), conv_bn(4, 5))
        self.heads = Heads(5, tasks)

    def forward(self, x):
        return self.heads(self.body(x))


class Residual(nn.Module):
    """As in torchvision: `out += identity`, then a ReLU in place."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


@entry(image)
class ResidualNet(Trunk):
    def __init__(self) -> None:
        super().__init__(conv_bn(3, 4), 6)
        self.blocks = nn.Sequential(Residual(4, 4), Residual(4, 6))

    def trap(self, x):
        return self.blocks(x)


@entry(image)
class ResidualIntoIdentity(Trunk):
    """The other way round: the identity is what is added to, and may not have fanned out."""

    def __init__(self) -> None:
        super().__init__(conv_bn(3, 4))
        self.shortcuts = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def trap(self, x):
        for shortcut, conv in zip(self.shortcuts, self.convs, strict=True):
            identity = shortcut(x)
            identity += conv(x)
            identity *= 0.5
            x = identity.relu()
        return x


@entry(image)
class InPlaceReLU(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3))
        self.second = nn.Conv2d(4, 4, 3)

    def trap(self, x):
        F.relu_(x)
        y = self.second(x)
        view = y.flatten(2)
        y.mul_(2.0)
        view[:, 0] = view[:, 0].clone() + view[:, 1]
        return F.leaky_relu(y, 0.1, inplace=True) + x.mean()


@entry(image)
class CatAndStack(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 2, 3), 6)
        self.left, self.right = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def trap(self, x):
        left, right = self.left(x), self.right(x)
        both = torch.stack([left, right, left * right]).sum(0)
        return torch.cat((x[..., :4, :4], both, right), dim=1)


@entry(image)
class ChunksAndLoops(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 1), 2)
        self.mix = nn.Conv2d(2, 2, 1)

    def trap(self, x):
        q, k, v = x.chunk(3, dim=1)
        x = torch.sigmoid(self.mix(q)) * k + v
        even, odd = (x[:, :, 0::2], x[:, :, 1::2])
        total = sum(row.exp() for row in even.unbind(2))
        first, *rest = odd.split(1, dim=2)
        for sample in x:  # goes over the batch
            total = total + sample.mean() / len(x)
        return (total + first.squeeze(2) + rest[-1][:, :, 0])[..., None]


@entry(image)
class Interpolated(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, stride=2))
        self.second = nn.Conv2d(4, 4, 1)

    def trap(self, x):
        y = F.interpolate(self.second(x), size=x.shape[-1] * 2, mode="bilinear", align_corners=False)
        return F.interpolate(x, y.shape[2:]) + F.pad(y, (1, 1))[..., 1:-1]


@entry(vector)
class Indexed(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8))
        self.second = nn.Linear(8, 8)

    def trap(self, x):
        y = self.second(x)
        values, order = y.max(dim=1, keepdim=True)
        y = torch.where(y > values - 3, y, x) + y.gather(1, order)
        y = y.masked_fill(y < -2, 0.0)[:, torch.tensor([0, 2, 4, 6])]
        return y + x[:, :4] + x.topk(4).values


@entry(vector)
class Assigned(Trunk):
    """Writes into new tensors that fan out with what they are made from."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.second = nn.Linear(4, 4)

    def trap(self, x):
        x = self.second(x)
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        y[:, 0] += x[:, 3] * 2
        y[y > 1] = 1.0
        z = x.new_zeros(x.shape)
        z.scatter_(1, x.argsort(dim=1), y)
        z[:, :2], z[:, 2:] = y[:, 2:], z[:, :2].clone()
        return torch.add(z, y) + y


@entry(vector)
class InPlace(Trunk):
    """Fanned values are written into fanned values."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.scale, self.shift = nn.Linear(4, 4), nn.Linear(4, 4)

    def trap(self, x):
        y = self.scale(x) + self.shift(x)
        y.add_(self.shift(x))
        y[:, 1] = self.shift(x)[:, 0] * 2
        y[:, 2] += self.shift(x * x)[:, 0]
        y *= x
        return y


@entry(vector)
class Shapes(Trunk):
    """Python numbers and shapes read off values."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.second = nn.Linear(4, 4)

    def trap(self, x):
        y = self.second(x)
        assert y.is_floating_point() and isinstance(y, Tensor) and y.requires_grad == x.requires_grad
        n, d = y.shape
        y = y.view(n, 2, -1).expand(*y.size()[:1], 2, d // 2).reshape(len(x), y.numel() // y.size(0))
        y = y + torch.arange(d, dtype=y.dtype, device=y.device).expand_as(y)
        y = torch.einsum("ni,nj->nij", y, x).flatten(1)
        return 1 - (2 / (1 + y[:, :d].t().contiguous().t() ** 2)) @ x.new_ones(d, d)


@dataclass
class Parts:
    value: Tensor
    extra: tuple[Tensor, int]


@entry(vector)
class Structures(Trunk):
    """Tuples, dicts and dataclasses go from module to module."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x, *, scale=1.0, more=None):
            y = self.norm(x) * scale
            return {"pair": (x, [y]), "more": more, "parts": Parts(y + x, (x * y, 2))}

    class Weigh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, parts):
            if self.training:
                self.seen.copy_(parts.value.detach().mean(0))
            return Parts(parts.value * self.weight + self.seen, (parts.extra[0], parts.extra[1] + 1))

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.split, self.weigh = Structures.Split(), Structures.Weigh()

    def trap(self, x):
        out = self.split(x, scale=self.weigh.weight, more={"x": x, "none": None})
        x, (y,) = out["pair"]
        parts = self.weigh(out["parts"])
        return x + y + out["more"]["x"] + parts.value + parts.extra[0] * parts.extra[1]


def two_inputs(batch: int) -> dict[str, Any]:
    return {"left": vector(batch), "right": (vector(batch), 0.5)}


@entry(two_inputs)
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.heads = nn.Linear(6, 4), nn.Linear(6, 4), Heads(4)
        self.join = nn.Bilinear(4, 4, 4)

    def forward(self, inputs):
        right, scale = inputs["right"]
        return self.heads(self.join(input2=self.right(right) * scale, input1=self.left(inputs["left"])))


def several_arguments(batch: int) -> Inputs:
    return inputs(vector(batch), vector(batch), scale=0.5, mask=torch.rand(batch, 4, dtype=torch.float64).round())


@entry(several_arguments)
class SeveralArguments(nn.Module):
    """A forward with keyword arguments, as language models have it, which calls its parts with some too."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm, self.heads = nn.Linear(6, 4), nn.Linear(6, 4), nn.BatchNorm1d(4), Heads(4)

    def forward(self, left, right, *, scale=1.0, mask=None):
        x = self.norm(input=self.left(left) * scale + self.right(input=right))
        return self.heads(x if mask is None else x.masked_fill(mask.bool(), 0.0))


@entry(vector)
class NestedOutputs(nn.Module):
    """A task's output may be any nest of tensors; an entry may be there that is no task's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 4), Heads(4)

    def forward(self, x):
        h = self.body(x)
        out = self.heads(h)
        return {"a": {"logits": out["a"], "h": h}, "b": [out["b"], (h, 1)], "c": Parts(out["c"], (h, 2)), "aux": h}


@entry(vector)
class IfTraining(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.train_only, self.eval_only = nn.Linear(4, 4), nn.Linear(4, 4)

    def trap(self, x):
        return self.train_only(x) if self.training else self.eval_only(x) + x


@entry(vector, draws=True)
class WithDropout(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.body = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.ReLU())

    def trap(self, x):
        return self.body(x)


@entry(lambda batch: image(batch).contiguous(memory_format=torch.channels_last))
class ChannelsLast(PlainConv):
    pass


@entry(vector)
class Cached(Trunk):
    """Keeps what it saw as plain attributes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.second = nn.Linear(4, 4)
        self.calls = 0
        self.last = None

    def trap(self, x):
        self.calls += 1
        self.last = self.second(x)
        return self.last + x


@entry(vector)
class FilledCache(Trunk):
    """Keeps what it works out from its weights in a dict until its mode changes, as LeViT does."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.cache, self.seen = {}, []

    def train(self, mode=True):
        self.cache.clear()
        return super().train(mode)

    def trap(self, x):
        self.seen.append(len(x))
        if self.training:
            return x + self.bias.exp()
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.exp()
        return x + self.cache["bias"]


# Ways to hold parameters.


@entry(image)
class ChildNamedBranches(Trunk):
    """Names of the user's that the surgery uses too (HRNet has such a child)."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([conv_bn(4, 4), conv_bn(4, 4)])
            self.layer, self.partition = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return sum(branch(x) for branch in self.branches) + self.layer["a"](x) * self.partition

    def __init__(self) -> None:
        super().__init__(conv_bn(3, 4))
        self.stage = ChildNamedBranches.Stage()

    def trap(self, x):
        return self.stage(x)


@entry(vector)
class HeldElsewhere(Trunk):
    """Runs its layers from plain lists and dicts, by a bound method, and by way of a child that knows its parent."""

    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = [parent]

        def forward(self, x):
            return self.parent[0].stages[1][0](x) + x

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.stages = [self.one, (self.two, self.norm)]
        self.by_name = {"first": self.first, "body": {"norm": self.norm}}
        self.child = HeldElsewhere.Child(self)
        self.run = self.by_stages

    def by_stages(self, x):
        x = torch.tanh(self.stages[0](x))
        return self.child(self.by_name["body"]["norm"](x))

    def trap(self, x):
        return self.run(x)


@entry(vector)
class ModuleReuse(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def trap(self, x):
        return self.shared(torch.tanh(self.shared(x)))


@entry(tokens)
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body, self.decode = nn.Linear(4, 4), nn.Linear(4, 7)
        self.decode.weight = self.embed.weight
        self.heads = Heads(7)

    def forward(self, x):
        return self.heads(self.decode(torch.tanh(self.body(self.embed(x)))).mean(1))


@entry(vector)
class TwoNames(Trunk):
    """One block, its norm and its bare parameter under two names each."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = self.alias = nn.BatchNorm1d(4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.alias(self.norm(self.linear(x)) * self.scale)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.one = self.two = TwoNames.Block()
        self.scale = self.one.scale

    def trap(self, x):
        return self.two(torch.sigmoid(self.one(x)) * self.scale)


@entry(vector)
class ChildsWeight(Trunk):
    """The parent reads its child's weight, as Swin's attention does."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.qkv = nn.Linear(4, 8)

    def trap(self, x):
        q, v = F.linear(x, self.qkv.weight, self.qkv.bias).split(self.qkv.in_features, dim=-1)
        return q.softmax(-1) * v + self.qkv.weight.mean()


@entry(image)
class BareParameters(Trunk):
    """A ViT's class token and position embedding, and a bare parameter with a buffer beside it."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 4, stride=4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.norm = nn.LayerNorm(4)
        self.register_buffer("scale", torch.full((4,), 1.5))

    def trap(self, x):
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(x * self.scale)[:, 0]


@entry(vector)
class BareParameterBesideStatistics(Trunk):
    """A container with a bare parameter and running statistics, whose parent reads the parameter too."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            x = self.linear(x) * self.scale
            if self.training:
                self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - self.mean

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.inner = BareParameterBesideStatistics.Inner()

    def trap(self, x):
        return self.inner(x) * self.inner.scale


@entry(vector)
class ParameterLists(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.gains = nn.ParameterList(torch.rand(4) for _ in range(3))
        self.shifts = nn.ParameterDict({"one": torch.rand(4), "two": torch.rand(4)})

    def trap(self, x):
        for gain in self.gains:
            x = x * gain
        return x + self.gains[-1] + sum(shift for _, shift in self.shifts.items()) * self.shifts["two"]


@entry(vector)
class Parametrized(Trunk):
    def __init__(self) -> None:
        super().__init__(weight_norm(nn.Linear(6, 4)))
        self.second = spectral_norm(nn.Linear(4, 4), n_power_iterations=2)
        self.third = weight_norm(nn.Linear(4, 4, bias=False))

    def trap(self, x):
        return self.third(torch.tanh(self.second(x)))


@entry(vector)
class Frozen(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4).requires_grad_(False))
        self.body = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.body[3].bias.requires_grad_(False)

    def trap(self, x):
        return self.body(x)


# Layers.


@entry(sequence)
class Attention(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def trap(self, x):
        y, weights = self.attention(x, x, x, need_weights=True)
        return (x + y).mean(1) + weights.std()


@entry(sequence)
class TransformerEncoder(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def trap(self, x):
        return self.encoder(x)[:, 0]


@entry(sequence)
class Recurrent(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)
        self.gru = nn.GRU(4, 2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(4, 4)

    def trap(self, x):
        x, (h, c) = self.lstm(x)
        x, last = self.gru(x, torch.stack([h[0, :, :2], c[0, :, 2:]]))
        state = h[-1]
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state + last.transpose(0, 1).flatten(1)


@entry(image)
class Norms(Trunk):
    """Every norm: without affine, cumulative, per instance with running statistics, over groups, over features."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3))
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4, affine=False),
                nn.BatchNorm2d(4, momentum=None),
                nn.BatchNorm2d(4, track_running_stats=False),
                nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                nn.GroupNorm(2, 4),
                nn.LayerNorm([4, 6, 6]),
                nn.RMSNorm(6),
                nn.SyncBatchNorm(4),
            ]
        )

    def trap(self, x):
        for norm in self.norms:
            x = x * 0.5 + norm(x).sin()
        return x


@entry(tokens)
class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(7, 4, padding_idx=0), nn.EmbeddingBag(7, 4, mode="sum")
        self.pick, self.heads = nn.Linear(4, 7), Heads(4)

    def forward(self, x):
        h = self.words(x).mean(1) + self.bag(x)
        return self.heads(h + self.words(self.pick(h).argmax(-1)))


@entry(tokens)
class SparseTables(nn.Module):
    """Their gradients hold the rows that were looked up alone; a row comes several times, and one table twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(7, 4, sparse=True), nn.EmbeddingBag(7, 4, mode="sum", sparse=True)
        self.body, self.heads = nn.Linear(4, 4), Heads(4)

    def forward(self, x):
        h = self.words(x).mean(1) + self.bag(x)
        return self.heads(torch.tanh(self.body(h)) + self.words(x[:, 0]))


# Statistics.


class RunningMean(nn.Module):
    """Keeps a running mean, in one of the ways that people write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
            mean = x.detach().mean(0)
            match self.how:
                case "in place":
                    self.mean.mul_(0.9).add_(mean, alpha=0.1)
                case "data":
                    self.mean.data.lerp_(mean, 0.1)
                case "reassigned":
                    self.mean = 0.9 * self.mean + 0.1 * mean
                case "augmented":
                    self.mean *= 0.9
                    self.mean += 0.1 * mean
                case "element":
                    self.mean[0] = mean[0]
                case "branching":
                    self.mean.copy_(mean if float(self.mean.abs().max()) > 0.1 else mean * 2)
        return x - self.mean


@entry(vector)
class RunningStatistics(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        ways = ["in place", "data", "reassigned", "augmented", "element", "branching"]
        self.means = nn.Sequential(*(nn.Sequential(RunningMean(how), nn.Linear(4, 4)) for how in ways))

    def trap(self, x):
        return self.means(x)


@entry(vector)
class StatisticsAroundStatistics(Trunk):
    """A module with a running buffer of its own, fed by layers that it holds itself."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.inner = nn.Linear(4, 4), nn.BatchNorm1d(4), RunningMean("reassigned")
            self.bare = nn.Parameter(torch.rand(4))
            self.register_buffer("centre", torch.zeros(4))

        def forward(self, x):
            y = self.inner(self.norm(self.linear(x))) * self.bare
            if self.training:
                self.centre.lerp_(y.detach().mean(0), 0.1)
            return y - self.centre + self.linear.bias

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.outer = StatisticsAroundStatistics.Outer()
        self.last = nn.Linear(4, 4)

    def trap(self, x):
        return self.last(self.outer(x))


@entry(vector)
class Counter(Trunk):
    """A buffer that changes in training, but not by values that fan out, in a module that they go through."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.body.register_buffer("steps", torch.zeros(()))
        self.body.register_forward_pre_hook(Counter.count)

    @staticmethod
    def count(module, args):
        if module.training:
            module.steps += 1

    def trap(self, x):
        return self.body(x) / (1 + self.body.steps)


@entry(image)
class FrozenStatistics(Trunk):
    """Keeps its norms in evaluation mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__(conv_bn(3, 4))
        self.second = conv_bn(4, 4)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def trap(self, x):
        return self.second(x)


# Who reaches what.


@entry(vector)
class SomeTasksOnly(nn.Module):
    """A layer that only a and b reach, with statistics; and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.extra = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.unused, self.heads = nn.Linear(4, 4), Heads(4)

    def forward(self, x):
        h = self.body(x)
        extra = self.heads(torch.tanh(self.extra(h)))
        return {"a": extra["a"], "b": extra["b"] + h[:, :2], "c": self.heads(h)["c"]}


@entry(vector)
class DetachedOutput(nn.Module):
    """Task b uses a's output, without its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.to_a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.to_b, self.to_c = nn.Linear(6, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        a = self.to_a(h)
        return {"a": a, "b": self.to_b(torch.cat([h, a.detach()], 1)), "c": self.to_c(h)}


@entry(vector)
class Checkpointed(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.last = nn.Linear(4, 4)

    def trap(self, x):
        x = checkpoint(self.body, x, use_reentrant=False)
        return checkpoint(lambda y: ReverseGradient.apply(self.last(y), 0.5) * y, x, use_reentrant=False)


class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.scale * gradient, None


class ScaledProduct(torch.autograd.Function):
    """Two outputs, saved tensors, and the newer form with setup_context; wrong gradients, to be told apart."""

    @staticmethod
    def forward(x, y, power=2):
        return x * y, (x + y) ** power

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, first, second):
        x, y = ctx.saved_tensors
        return first * y * 3, second * x * 5, None


@entry(vector)
class CustomGradients(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def trap(self, x):
        x = ReverseGradient.apply(x, 0.7)
        product, power = ScaledProduct.apply(self.left(x), x)
        return self.right(product) + power


@entry(vector)
class GradientHooks(Trunk):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.second = nn.Linear(4, 4)

    def trap(self, x):
        y = self.second(x)
        if y.requires_grad:
            handle = y.register_hook(lambda gradient: -0.5 * gradient)
            y.register_hook(lambda gradient: gradient * 100).remove()
            assert handle is not None
        return y


# Whole architectures.


@entry(image)
class SegNet(nn.Module):
    """Max-unpooling takes its indices from the encoder (Badrinarayanan et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = conv_bn(3, 4), conv_bn(4, 4)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 1) for task in TASKS})

    def forward(self, x):
        x = self.encode(x)
        pooled, indices = self.pool(x)
        x = self.decode(self.unpool(pooled, indices, output_size=x.shape))
        return {task: head(x) for task, head in self.heads.items()}


@entry(image)
class MTAN(nn.Module):
    """A soft attention mask per task over shared features (Liu et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList([conv_bn(3, 4), conv_bn(4, 4)])
        self.masks = nn.ModuleDict(
            {task: nn.ModuleList([nn.Sequential(nn.Conv2d(w, 4, 1), nn.Sigmoid()) for w in (4, 8)]) for task in TASKS}
        )
        self.refine = nn.ModuleList(conv_bn(4, 4, stride=2) for _ in range(2))
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        features = OrderedDict()
        for level, block in enumerate(self.shared):
            features[level] = x = F.max_pool2d(block(x), 2 if level else 1)
        out = {}
        for task, masks in self.masks.items():
            y = None
            for (level, feature), mask, refine in zip(features.items(), masks, self.refine, strict=True):
                y = mask(feature if level == 0 else torch.cat([feature, y], 1)) * feature
                y = refine(y)
                if level == 0:
                    y = F.adaptive_avg_pool2d(y, 4)
            out[task] = self.heads[task](y.amax((2, 3)))
        return out


@entry(image)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_bn(3, 4), conv_bn(4, 4)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4, 4, 2, stride=2) for _ in range(2)])
        self.merge = nn.ModuleList([conv_bn(8, 4), conv_bn(8, 4)])
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 1) for task in TASKS})

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((up(x), skips.pop()), dim=1))
        return {task: self.heads[task](x) for task in self.heads}
