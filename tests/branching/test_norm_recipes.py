"""Recipes that find norms by their class, on a branched model: shared norms behind the branch point are what they were.

What is right is what the recipe does to each task's plain model, which is loaded by key alone (`oracle.plain_model`).
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

import recon
from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.plan import BranchPlan
from recon.errors import FanError, UsageError
from tests import oracle
from tests.zoo import TASKS, image

NORMS = ("body.1", "body.4", "body.7")  # shared behind the branch point, the first for all; the last one is branched
both_modes = pytest.mark.parametrize("mode", ["fan", "per-task"])


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        layers = []
        for _ in range(3):
            layers += [nn.Conv2d(4 if layers else 3, 4, 3, padding=1), norm(4), nn.Tanh()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        h = self.body(x).mean((2, 3))
        return {task: head(h) for task, head in self.heads.items()}


def running(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def make(norm=nn.BatchNorm2d):
    return Net(norm).double()


def branch(mode="fan", norm=nn.BatchNorm2d, layers=("body.0", "body.7")):
    torch.manual_seed(0)
    plan = BranchPlan.grouped({layer: [["a", "b"], ["c"]] for layer in layers}, TASKS)
    branched = convert(make(norm), plan, image(4), mode=mode)
    oracle.perturb(branched)
    return branched


def norms_of(model):
    """By name in the plain model."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    }


@both_modes
def test_a_shared_norm_is_what_it_was(mode):
    branched = branch(mode)
    found = norms_of(branched)
    assert {"body.1", "body.4", "body.7.branches.a+b", "body.7.branches.c"} == set(found)
    assert all(type(norm).__name__ == "BatchNorm2d" and isinstance(norm, nn.BatchNorm2d) for norm in found.values())
    without_decay = {p for norm in found.values() for p in norm.parameters(recurse=False)}
    expected = {p for name, p in branched.named_parameters() if name.startswith(NORMS)}
    assert without_decay == expected and len(expected) == 8
    keys = [key for key in branched.state_dict() if key.startswith("body.1.")]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert keys == ["body.1.weight", "body.1.bias"] + [
        f"body.1.branches.{group}.{name}" for group in ("a+b", "c") for name in statistics
    ]
    for task in TASKS:
        assert type(extract_task(branched, task).body[1]) is nn.BatchNorm2d


@both_modes
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, running], ids=["BatchNorm", "InstanceNorm"])
def test_update_bn(norm, mode):
    branched, batches = branch(mode, norm), [image(4) + 1, image(4) - 1]
    plains = {task: extract_task(branched, task) for task in TASKS}
    update_bn(batches, branched)
    for task, plain in plains.items():
        update_bn(batches, plain)
        found = extract_task(branched, task)
        for (key, value), other in zip(plain.state_dict().items(), found.state_dict().values(), strict=True):
            oracle.assert_close(other, value, f"{key} of {task}")
        assert {norm.momentum for norm in norms_of(found).values()} == {0.1}


RECIPES = {
    "fresh statistics": lambda norm: norm.reset_running_stats(),
    "fresh parameters": lambda norm: norm.reset_parameters(),
    "a gain of zero": lambda norm: nn.init.zeros_(norm.weight),
    "frozen": lambda norm: norm.eval(),
    "momentum": lambda norm: setattr(norm, "momentum", 0.5),
    "cumulative": lambda norm: setattr(norm, "momentum", None),
    "eps": lambda norm: setattr(norm, "eps", 0.1),
    "not tracked": lambda norm: setattr(norm, "track_running_stats", False),
    "no statistics": lambda norm: [setattr(norm, name, None) for name in ("running_mean", "running_var")],
    "assigned": lambda norm: setattr(norm, "running_mean", torch.full((4,), 0.3).double()),
    "registered": lambda norm: norm.register_buffer("running_var", torch.full((4,), 2.0).double()),
    "in place": lambda norm: norm.running_var.mul_(1.5),
    "by data": lambda norm: norm.weight.data.fill_(0.5),
}


@both_modes
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_done_to_every_norm(recipe, mode):
    """For every task, as if it had been done to its plain model."""

    def apply(model):
        model.apply(lambda part: RECIPES[recipe](part) if isinstance(part, _BatchNorm) else None)

    branched, inputs = branch(mode), image(4)
    branched.train()(image(4))
    plains = {task: extract_task(branched, task) for task in TASKS}
    apply(branched)
    for plain in plains.values():
        apply(plain)
    for step in ("as they are", "train", "eval"):
        if step != "as they are":
            for model in (branched, *plains.values()):
                model.train(step == "train")
        outputs = branched(inputs)
        for task, plain in plains.items():
            oracle.assert_close(outputs[task], plain(inputs)[task], f"{task}, {step}")
    for task, plain in plains.items():
        for (key, value), other in zip(
            plain.state_dict().items(), extract_task(branched, task).state_dict().values(), strict=True
        ):
            oracle.assert_close(other, value, key)


@pytest.mark.parametrize("path", ["body.1", "body.7"], ids=["shared", "branched"])
def test_an_attribute_of_one_norm(path):
    branched, inputs = branch(), image(4)
    plains = {task: extract_task(branched, task) for task in TASKS}
    for model in (branched, *plains.values()):
        model.get_submodule(path).momentum = 0.7
    outputs = branched.train()(inputs)
    for task, plain in plains.items():
        oracle.assert_close(outputs[task], plain.train()(inputs)[task], task)
        found = extract_task(branched, task).get_submodule(path)
        oracle.assert_close(found.running_mean, plain.get_submodule(path).running_mean, task)


# Norms made anew.


@both_modes
def test_sync_batch_norm(mode):
    branched = branch(mode)
    before = {key: value.clone() for key, value in branched.state_dict().items()}
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(branched)
    assert set(norms_of(synced)) == set(norms_of(branched))
    assert {type(norm).__name__ for norm in norms_of(synced).values()} == {"SyncBatchNorm"}
    assert list(synced.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in synced.state_dict().items())
    assert not any(type(buffer) is recon.branching.fans.fan.TaskFan for buffer in synced.buffers())

    def plain():
        return nn.SyncBatchNorm.convert_sync_batchnorm(make())

    for training in (True, False):
        oracle.check(plain, synced.train(training), image(4))
    assert recon.verify(plain(), synced, image(4)).modes == ("evaluation", "training")
    assert type(extract_task(synced, "b").body[1]) is nn.SyncBatchNorm
    for copied in (copy.deepcopy(synced), _pickled(synced)):
        oracle.check(plain, copied.eval(), image(4))
    checkpoint = make().state_dict()
    synced.load_state_dict(checkpoint)
    for group in ("a+b", "c"):
        assert torch.equal(
            synced.state_dict()[f"body.1.branches.{group}.running_var"], checkpoint["body.1.running_var"]
        )


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d: everything is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(4))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def freeze(model, fill):
    for path, norm in list(norms_of(model).items()):
        parent, _, name = path.rpartition(".")
        frozen = Frozen()
        frozen.weight, frozen.bias = norm.weight.detach(), norm.bias.detach()
        fill(frozen, norm)
        setattr(model.get_submodule(parent), name, frozen)
    return model


def assigned(frozen, norm):
    frozen.running_mean, frozen.running_var = norm.running_mean.clone(), norm.running_var


@both_modes
def test_norms_frozen_by_assignment(mode):
    branched = branch(mode)
    plains = {task: freeze(extract_task(branched, task), assigned).eval() for task in TASKS}
    freeze(branched, assigned)
    for training in (True, False):
        outputs = branched.train(training)(image(4) if training else image(2))
    inputs = image(3)
    outputs = branched(inputs)
    for task, plain in plains.items():
        oracle.assert_close(outputs[task], plain(inputs)[task], task)
        oracle.assert_close(extract_task(branched, task)(inputs)[task], outputs[task], task)
    assert "body.1.branches.c.running_mean" in branched.state_dict()
    assert all(type(value) is not recon.branching.fans.fan.TaskFan for value in branched.state_dict().values())


def test_norms_frozen_by_copying():
    """One tensor cannot take what differs between groups."""
    with pytest.raises(FanError, match="differ between tasks"):
        freeze(branch(), lambda frozen, norm: frozen.running_mean.copy_(norm.running_mean))


def test_a_fan_as_a_new_buffer_or_a_parameter():
    norm = branch().body[1]
    with pytest.raises(FanError, match=r"new buffer 'mean' of Linear .* Register a tensor of their shape"):
        nn.Linear(2, 2).register_buffer("mean", norm.running_mean)
    with pytest.raises(FanError, match="parameter 'bias' of a Linear would differ between tasks"):
        nn.Linear(4, 4).bias = nn.Parameter(norm.running_mean)


# Folding norms into what is before them.


@both_modes
def test_a_norm_folded_into_a_branched_convolution(mode):
    branched, inputs = branch(mode).eval(), image(4)
    branched.body[0] = fuse_conv_bn_eval(branched.body[0], branched.body[1])
    expected = branch(mode).eval()(inputs)
    branched.body[1] = nn.Identity()
    outputs = branched(inputs)
    assert all(torch.allclose(outputs[task], expected[task], rtol=1e-9) for task in TASKS)


def test_a_norm_folded_into_a_shared_convolution():
    branched = branch().eval()
    with pytest.raises(FanError, match="parameter 'weight' of a Conv2d would differ between tasks"):
        fuse_conv_bn_eval(branched.body[3], branched.body[4])


# Averages, lazy norms, names.


@both_modes
def test_averaged_buffers(mode):
    branched = branch(mode)
    average = AveragedModel(branched, use_buffers=True)
    for shift in (1.0, -1.0):
        branched.train()(image(4) + shift)
        average.update_parameters(branched)
    update_bn([image(4), image(4) * 2], average)
    oracle.check(make, average.module.eval(), image(4))


def test_lazy_norms():
    def lazy():
        model = Net(lambda channels: nn.LazyBatchNorm2d()).double()
        model(image(2))
        return model

    branched = convert(lazy(), BranchPlan.per_task(["body.0"], TASKS), image(4))
    oracle.perturb(branched)
    for training in (True, False):
        oracle.check(lazy, branched.train(training), image(4))
    assert isinstance(branched.body[4], nn.BatchNorm2d)


def test_an_attribute_named_as_the_branches_are():
    model = make()
    model.body[1].branches = 3
    with pytest.raises(UsageError, match="BatchNorm2d keeps running statistics and has an attribute named 'branches'"):
        convert(model, BranchPlan.per_task(["body.0"], TASKS), image(4))


def test_a_state_of_an_older_version_of_the_class():
    """torch adds num_batches_tracked to states of BatchNorm's first version, where the branched model has none."""
    branched = branch()
    state = copy.deepcopy(branched.state_dict())
    state._metadata["body.1"]["version"] = 1
    other = branch()
    oracle.perturb(other, seed=1)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


class Codebook(nn.Module):
    """A vector quantizer whose codes follow running means of what is quantized, as `codes.quantize(x)` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.rand(5, 4))
        self.register_buffer("count", torch.ones(5))
        self.loss, self.calls = None, 0

    def forward(self, x):
        quantized = self.quantize(x)
        self.loss = (x - quantized.detach()).square().mean()
        self.calls += 1
        return quantized

    def quantize(self, x):
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            hits = nn.functional.one_hot(nearest, 5).to(x)
            self.count.mul_(0.9).add_(hits.sum(0), alpha=0.1)
            self.codes = self.codes * 0.9 + 0.1 * (hits.t() @ x.detach()) / self.count[:, None]
        return x + (self.codes[nearest] - x).detach()


class Quantized(nn.Module):
    def __init__(self, loss_weight=0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.first, self.book = nn.Linear(6, 4), Codebook()
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        h = self.book.quantize(self.first(x)) if self.loss_weight == 0 else self.book(self.first(x))
        loss = 0 if self.book.loss is None else self.loss_weight * self.book.loss
        return {task: head(h) + loss for task, head in self.heads.items()}


@both_modes
def test_a_codebook_that_is_never_called(mode):
    torch.manual_seed(0)
    x = torch.randn(4, 6).double()
    branched = convert(Quantized().double(), BranchPlan.per_task(["first"], TASKS), x, mode=mode)
    oracle.perturb(branched)
    for _ in range(2):
        for training in (True, False):
            oracle.check(lambda: Quantized().double(), branched.train(training), x)


@both_modes
def test_what_a_module_with_statistics_remembers(mode):
    """Its own loss is every task's, not the last one's; it was called once for every task, not once for each."""
    torch.manual_seed(0)
    x = torch.randn(4, 6).double()
    branched = convert(Quantized(1).double(), BranchPlan.per_task(["first"], TASKS), x, mode=mode)
    oracle.perturb(branched)
    for training in (True, False):
        oracle.check(lambda: Quantized(1).double(), branched.train(training), x)
    assert branched.book.calls == 2
