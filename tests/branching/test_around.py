"""What people put around a model, put around a branched one: precision, memory formats, hooks, optimizers, pickle."""

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import recon
from recon.branching.conversion import convert
from recon.branching.fans.fan import TaskFan
from recon.branching.fans.trees import partition_of, value_for
from recon.branching.plan import BranchPlan, Mode, plan_of
from recon.errors import FanError
from recon.support.network.graph import reached_leaves
from tests import oracle
from tests.zoo import TASKS, ZOO, Heads, PlainConv, Residual, conv_bn, image

both_modes = pytest.mark.parametrize("mode", ["fan", "per-task"])


def branch(name: str, kind: str = "all", seed: int = 0, mode: Mode = "fan") -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO[name].make()
    branched = convert(model, oracle.random_plan(model, kind, seed), ZOO[name].inputs(4), mode=mode)
    oracle.perturb(branched)
    return branched


def total(outputs: dict[str, Any]) -> Tensor:
    return sum(oracle.loss_of(outputs[task], task) for task in TASKS)


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    total(model(copy.deepcopy(inputs))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal to the bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        assert value is None or torch.equal(actual[name], value), name


# Memory formats.


def channels_last(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.to(memory_format=torch.channels_last)
    return value.contiguous(memory_format=torch.channels_last)


def strides(model: nn.Module, inputs: Tensor, task: str) -> dict[str, list[tuple[int, ...]]]:
    """How a task's value lies in memory, after every module that gives one tensor."""
    found: dict[str, list[tuple[int, ...]]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if type(out) is TaskFan and task not in partition_of(out).tasks:
                return
            if isinstance(out, Tensor):
                found.setdefault(path, []).append(value_for(out, task).stride())

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules()]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("moved", ["before", "after"])
@pytest.mark.parametrize("name", ["PlainConv", "ResidualNet", "CatAndStack", "Interpolated", "Norms", "UNet"])
def test_channels_last(name, moved):
    torch.manual_seed(0)
    entry, inputs = ZOO[name], channels_last(image(4))
    model = channels_last(entry.make()) if moved == "before" else entry.make()
    branched = convert(model, oracle.random_plan(model, "quarter", 0), inputs if moved == "before" else image(4))
    if moved == "after":
        channels_last(branched)
    oracle.perturb(branched)
    for training in (True, False):
        oracle.check(lambda: channels_last(entry.make()), branched.train(training), inputs)
    kernels = [p for p in branched.parameters() if p.dim() == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    for task in TASKS:
        found = strides(branched, inputs, task)
        expected = strides(channels_last(oracle.plain_model(entry.make, branched, task)), inputs, task)
        compared = {path for path in expected if path in found}
        assert {path: found[path] for path in compared} == {path: expected[path] for path in compared}
        images = [stride for path in compared for stride in found[path] if len(stride) == 4]
        assert any(stride[1] == 1 and stride[3] > 1 for stride in images)


# Precision.


def plain_models(make: Callable[[], nn.Module], branched: nn.Module) -> dict[str, nn.Module]:
    return {task: oracle.plain_model(make, branched, task) for task in TASKS}


@both_modes
@pytest.mark.parametrize("name", ["PlainConv", "ResidualNet", "ParameterLists", "TransformerEncoder"])
def test_training_steps_under_autocast(name, mode):
    def make() -> nn.Module:
        return ZOO[name].make().float()

    branched = branch(name, "quarter", mode=mode).float()
    optimizer = torch.optim.SGD(branched.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        inputs, plains = ZOO[name].inputs(4).float(), plain_models(make, branched)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = branched(inputs)
            expected = {task: plain(inputs)[task] for task, plain in plains.items()}
        for task in TASKS:
            assert outputs[task].dtype == torch.bfloat16 and torch.equal(outputs[task], expected[task])
            oracle.loss_of(expected[task], task).backward()
        optimizer.zero_grad()
        total(outputs).backward()
        _assert_autocast_gradients(branched, plains)
        optimizer.step()


def _assert_autocast_gradients(branched: nn.Module, plains: dict[str, nn.Module]) -> None:
    parameters = dict(branched.named_parameters())
    collected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for task, plain in plains.items():
        keys = oracle.keys_of(branched, task, set(oracle.state_of(plain)))
        for key, parameter in plain.named_parameters():
            if parameter.grad is not None:
                collected[keys[key]].append(parameter.grad)
    assert {len(found) for found in collected.values()} >= {1, len(TASKS)}
    for name, found in collected.items():
        gradient = parameters[name].grad
        if not found:  # a copy of a task's head for another task
            assert gradient is None, name
            continue
        assert gradient.dtype == torch.float32
        if len(found) == 1:
            assert torch.equal(gradient, found[0]), name
        else:  # what several tasks reach sums their gradients in bfloat16, as autocast casts a weight once
            assert (gradient - sum(found)).norm() <= 0.03 * sum(g.norm() for g in found), name


@pytest.mark.parametrize("name", ["PlainConv", "ResidualNet", "BareParameters", "StatisticsAroundStatistics"])
def test_bfloat16_throughout(name):
    entry = ZOO[name]
    branched = branch(name).to(torch.bfloat16)
    inputs = entry.inputs(4).bfloat16()
    for training in (True, False):
        branched.train(training)
        oracle.check(lambda: entry.make().to(torch.bfloat16), branched, inputs)


class Recomputed(nn.Module):
    """Blocks with dropout that keep nothing for the backward but their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads = conv_bn(3, 4), Heads(6)
        self.blocks = nn.ModuleList([nn.Sequential(Residual(4, 4), nn.Dropout(0.5)), Residual(4, 6)])
        self.checkpointed = True

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.heads(x)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("layers", [["first.0"], ["blocks.0.0.conv2", "blocks.1.bn1"]], ids="+".join)
def test_activation_checkpointing(layers, autocast):
    torch.manual_seed(0)
    model, inputs = Recomputed(), image(4).float()
    branched = convert(model, BranchPlan.per_task(layers, TASKS), inputs)
    oracle.perturb(branched)
    runs = []
    branched.blocks[1].register_forward_pre_hook(lambda *_: runs.append(branched.checkpointed))
    found = {}
    for branched.checkpointed in (True, False):
        with torch.random.fork_rng(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = branched(inputs)
        branched.zero_grad()
        total(outputs).backward()
        found[branched.checkpointed] = {name: p.grad for name, p in branched.named_parameters()} | outputs
    assert runs == [True, True, False]
    assert outputs["a"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_same(found[True], found[False])


# Without gradients.


@both_modes
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["ResidualNet", "BareParameters", "StatisticsAroundStatistics", "Attention"])
def test_without_gradients(name, without: Callable[[], AbstractContextManager], mode):
    branched, inputs = branch(name, mode=mode), ZOO[name].inputs(4)
    for training in (True, False):
        branched.train(training)
        plains = plain_models(ZOO[name].make, branched)
        with without():
            outputs = branched(inputs.clone())
            expected = {task: plain(inputs.clone())[task] for task, plain in plains.items()}
        for task, plain in plains.items():
            oracle.assert_outputs_close(outputs[task], expected[task], task)
            assert not outputs[task].requires_grad and outputs[task].is_inference() == expected[task].is_inference()
            keys = oracle.keys_of(branched, task, set(oracle.state_of(plain)))
            buffers = dict(branched.named_buffers())
            for key, buffer in plain.named_buffers():
                oracle.assert_close(buffers[keys[key]], buffer, key)
    if name != "StatisticsAroundStatistics" or without is torch.no_grad:  # a buffer assigned anew stays what it became
        oracle.check(ZOO[name].make, branched.train(), inputs)


# Hooks.


def hooked(register: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """A model whose second convolution is branched, after a hook was put on it."""
    torch.manual_seed(0)
    model = PlainConv().double()
    if register is not None:
        register(model.body[1][0])
    return convert(model, BranchPlan.grouped({"body.1.0": [["a", "b"], "c"]}, TASKS), image(2))


def with_hook(branched: nn.Module, task: str, register: Callable[[nn.Module], object]) -> nn.Module:
    """One task's plain model, with the hook."""
    plain = oracle.plain_model(lambda: PlainConv().double(), branched, task)
    register(plain.body[1][0])
    return plain


def test_a_forward_hook_from_before_the_conversion_sees_each_copy():
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    branched = hooked(lambda conv: conv.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))))
    oracle.perturb(branched)
    seen.clear()
    branched(image(4))
    copies = [copy for _, copy in branched.body[1][0].branches.items()]
    assert [module for module, _, _ in seen] == copies
    for module, x, out in seen:
        assert type(x) is Tensor and type(out) is Tensor
        assert torch.equal(out, nn.functional.conv2d(x, module.weight, None, 1, 1))
    assert not torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize(
    "register",
    [
        lambda conv: conv.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.mean(),)),
        lambda conv: conv.register_forward_hook(lambda module, args, out: out * args[0].mean() + module.weight.mean()),
        lambda conv: conv.register_forward_hook(lambda module, a, kwargs, out: out.tanh(), with_kwargs=True),
        lambda conv: conv.register_full_backward_hook(
            lambda module, gradient, _: (gradient[0] * module.weight.mean(),)
        ),
        lambda conv: conv.register_full_backward_pre_hook(lambda module, gradient: (gradient[0] * 3,)),
    ],
    ids=["forward pre-hook", "forward hook", "with kwargs", "backward hook", "backward pre-hook"],
)
def test_what_a_hook_from_before_the_conversion_changes(register):
    branched = hooked(register)
    oracle.perturb(branched)

    def make() -> nn.Module:
        model = PlainConv().double()
        register(model.body[1][0])
        return model

    for training in (True, False):
        oracle.check(make, branched.train(training), image(4))


def test_a_forward_hook_on_a_branched_layer_sees_the_fan():
    branched = hooked()
    seen: list[tuple[Tensor, Any]] = []
    layer, inputs = branched.body[1][0], image(4)
    before = branched.eval()(inputs)
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    branched(inputs)
    (x, out), *rest = seen
    assert not rest and type(x) is Tensor and partition_of(out).groups == (("a", "b"), ("c",))
    handle.remove()
    handle = layer.register_forward_hook(lambda m, args, out: out * 2)
    outputs = branched(inputs)
    for task in TASKS:
        plain = with_hook(branched, task, lambda conv: conv.register_forward_hook(lambda m, args, out: out * 2))
        oracle.assert_close(outputs[task], plain(inputs)[task], task)
        assert not torch.allclose(outputs[task], before[task])
    handle.remove()
    assert_same(branched(inputs), before)


def test_a_forward_hook_after_the_branch_point_sees_the_fan():
    branched = hooked()
    seen: list[Any] = []
    branched.body[3][0].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    branched(image(4))
    assert [[partition_of(value).groups for value in pair] for pair in seen] == [[(("a", "b"), ("c",))] * 2]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backward_hook_sees_each_copy_s_gradients(when):
    seen: dict[nn.Module, list[Tensor]] = {}

    def register(conv: nn.Module) -> None:
        conv.register_full_backward_hook(lambda module, inwards, out: seen.update({module: [*inwards, *out]}))

    branched = hooked(register if when == "before" else None)
    oracle.perturb(branched)
    copies = dict(branched.body[1][0].branches.items())
    if when == "after":
        for each in copies.values():
            register(each)
    inputs = image(4)
    plain = with_hook(branched, "c", register)
    total(branched(inputs)).backward()
    oracle.loss_of(plain(inputs)["c"], "c").backward()
    assert set(seen) == {*copies.values(), plain.body[1][0]}
    for one, other in zip(seen[copies["c"]], seen[plain.body[1][0]], strict=True):
        oracle.assert_close(one, other, "gradient")


def test_a_backward_hook_before_the_branch_point_sees_the_sum_over_the_tasks():
    seen: list[Tensor] = []

    def register(model: nn.Module) -> None:
        model.body[0][1].register_full_backward_hook(lambda module, inwards, out: seen.append(inwards[0]))

    branched = hooked()
    oracle.perturb(branched)
    plains, inputs = plain_models(lambda: PlainConv().double(), branched), image(4)
    for model in (branched, *plains.values()):
        register(model)
    total(branched(inputs)).backward()
    for task, plain in plains.items():
        oracle.loss_of(plain(inputs)[task], task).backward()
    assert len(seen) == 1 + len(TASKS)
    oracle.assert_close(seen[0], sum(seen[1:]), "gradient")


@pytest.mark.parametrize("path", ["body.1.0", "body.1.1", "body.3", "heads"])
def test_a_backward_hook_where_values_have_fanned_out_is_refused(path):
    branched = hooked()
    branched.get_submodule(path).register_full_backward_hook(lambda *_: None)
    with pytest.raises(FanError, match="differs between tasks"):
        branched(image(4))


def test_global_hooks():
    branched = hooked()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        branched(image(4))
    finally:
        handle.remove()
    layer = branched.body[1][0]
    assert seen.count(layer) == 1 and all(seen.count(each) == 1 for _, each in layer.branches.items())
    assert seen[-1] is branched


# Saving whole models.


@pytest.mark.parametrize(
    "name",
    [
        "PlainConv", "ModuleReuse", "TiedWeights", "Recurrent", "RunningStatistics", "Norms", "SomeTasksOnly", "Frozen",
        "BareParameters", "TwoNames", "ParameterLists", "StatisticsAroundStatistics", "ChildNamedBranches",
    ],
)  # fmt: skip
@both_modes
def test_a_pickled_model(name, mode):
    entry = ZOO[name]
    branched, inputs = branch(name, mode=mode), entry.inputs(4)
    file = io.BytesIO()
    torch.save(branched, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert plan_of(loaded) == plan_of(branched)
    assert_same(loaded.state_dict(), branched.state_dict())
    assert not {*loaded.parameters()} & {*branched.parameters()}
    for training in (True, False):
        outputs, expected = loaded.train(training)(inputs), branched.train(training)(inputs)
        assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)
    oracle.perturb(loaded, seed=1)
    for training in (True, False):
        oracle.check(entry.make, loaded.train(training), inputs)


# Optimizers.


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    ],
    ids=["SGD", "Adam"],
)
@pytest.mark.parametrize("name", ["ResidualNet", "BareParameters", "TwoNames", "StatisticsAroundStatistics"])
def test_training_goes_on_from_a_checkpoint(name, make_optimizer):
    entry, branched = ZOO[name], branch(name)
    batches = [entry.inputs(4) for _ in range(4)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
        for batch in batches:
            gradients(model, batch)
            optimizer.step()

    optimizer = make_optimizer(branched.parameters())
    train(branched, optimizer, batches[:2])
    file = io.BytesIO()
    torch.save({"model": branched.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    resumed = convert(entry.make(), plan_of(branched))
    optimizer_resumed = make_optimizer(resumed.parameters())
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer_resumed.load_state_dict(state["optimizer"])
    train(branched, optimizer, batches[2:])
    train(resumed, optimizer_resumed, batches[2:])
    assert_same(resumed.state_dict(), branched.state_dict())


@pytest.mark.parametrize(
    "name", ["ResidualNet", "TwoNames", "TiedWeights", "Recurrent", "ParameterLists", "StatisticsAroundStatistics"]
)
def test_parameter_groups(name):
    """Copies in one group of the optimizer, the rest in another: torch refuses a parameter that is in both."""
    branched, inputs = branch(name, "quarter", 3), ZOO[name].inputs(4)
    named = dict(branched.named_parameters())
    copies = {key: p for key, p in named.items() if ".branches." in key}
    assert all(key.startswith(tuple(f"{layer}.branches." for layer in plan_of(branched).layers)) for key in copies)
    shared = [p for key, p in named.items() if key not in copies]
    reached = reached_leaves([total(branched(inputs))])
    assert shared and copies and reached <= {*copies.values(), *shared}
    optimizer = torch.optim.SGD([{"params": list(copies.values())}, {"params": shared, "lr": 0.0}], lr=0.1)
    before = {key: p.detach().clone() for key, p in named.items()}
    found = gradients(branched, inputs)
    optimizer.step()
    for key, parameter in named.items():
        if key not in copies:
            assert torch.equal(parameter, before[key]), key
        elif found[key] is not None and found[key].abs().max() > 1e-9:
            assert not torch.equal(parameter, before[key]), key


def test_a_frozen_copy():
    branched, inputs = branch("ResidualNet", "one", 0), image(4)
    (layer,) = plan_of(branched).layers
    free = gradients(branched, inputs)
    branched.get_submodule(layer).branches.get_submodule("b").requires_grad_(False)
    frozen = {key for key in free if f"{layer}.branches.b." in key}
    assert frozen
    expected = {key: None if key in frozen else gradient for key, gradient in free.items()}
    assert_same(gradients(branched, inputs), expected)
    branched.zero_grad()
    outputs = branched(inputs)
    recon.backward({t: oracle.loss_of(outputs[t], t) for t in TASKS}, branched, recon.methods.get("pcgrad"))
    assert {key for key, p in branched.named_parameters() if p.grad is None} == frozen
    branched.get_submodule(layer).requires_grad_(False)
    found = gradients(branched, inputs)
    assert {key for key, gradient in found.items() if gradient is None} == {k for k in found if f"{layer}." in k}


@pytest.mark.parametrize("name", ["ResidualNet", "BareParameters", "StatisticsAroundStatistics"])
def test_averaged_weights(name):
    branched, inputs = branch(name), ZOO[name].inputs(4)
    average = AveragedModel(branched, use_buffers=True)
    states = []
    for seed in (1, 2):
        oracle.perturb(branched, seed)
        states.append(copy.deepcopy(branched.state_dict()))
        average.update_parameters(branched)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            oracle.assert_close(value, (states[0][key] + states[1][key]) / 2, key)
    oracle.check(ZOO[name].make, average.module.eval(), inputs)


@pytest.mark.parametrize("name", ["ResidualNet", "RunningStatistics", "Recurrent"])
def test_functional_calls(name):
    branched, inputs = branch(name, "quarter").eval(), ZOO[name].inputs(4)
    other = copy.deepcopy(branched)
    oracle.perturb(other, seed=1)
    outputs = torch.func.functional_call(branched, other.state_dict(), (inputs,))
    expected, own = other(inputs), branched(inputs)
    for task in TASKS:
        oracle.assert_close(outputs[task], expected[task], task)
        assert not torch.allclose(outputs[task], own[task])
