"""What a branched model must compute, worked out without any of the machinery that computes it.

For every task, its output is that of the original architecture loaded with the task's copies. The plain models here
are loaded by key alone: `<layer>.branches.<group>.<parameter>` for the group that holds the task, everything else
under its own key.
"""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recon.branching.fans.fan import TaskFan
from recon.branching.plan import BranchPlan, plan_of
from recon.support.network.forward import call
from recon.support.network.layers import find_layers

_BRANCH = re.compile(r"(?:^|\.)branches\.([a-z](?:\+[a-z])*)(?=\.)")  # tasks are named by a letter in these tests

KINDS = ("one", "quarter", "all", "first", "last")


# Plans.


def random_plan(model: nn.Module, kind: str, seed: int, tasks: tuple[str, ...] = ("a", "b", "c")) -> BranchPlan:
    """Some of the model's layers, split per task or, for odd seeds, each into its own random groups."""
    draw = random.Random(seed)
    names = [layer.name for layer in find_layers(model)]
    count = {"one": 1, "quarter": max(1, len(names) // 4), "all": len(names)}.get(kind, 1)
    match kind:
        case "first":
            chosen = names[:1]
        case "last":
            chosen = names[-1:]
        case _:
            chosen = draw.sample(names, count)
    if seed % 2 == 0:
        return BranchPlan.per_task(chosen, tasks)
    return BranchPlan.grouped({name: random_groups(tasks, draw) for name in chosen}, tasks)


def random_groups(tasks: tuple[str, ...], draw: random.Random) -> list[list[str]]:
    while True:
        groups: dict[int, list[str]] = {}
        for task in tasks:
            groups.setdefault(draw.randrange(len(tasks)), []).append(task)
        if len(groups) > 1:
            return list(groups.values())


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Change every parameter and floating-point buffer, so that no two copies stay equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for state in [*model.parameters(), *model.buffers()]:
            if state.is_floating_point():  # positive, so that running variances stay so
                state.add_(0.2 * torch.rand(state.shape, generator=generator, dtype=state.dtype).to(state.device))


# Plain models.


def keys_of(branched: nn.Module, task: str, plain_keys: set[str]) -> dict[str, str]:
    """`{key in the plain model: key in the branched one}`, for one task."""
    names = [name for name, _ in branched.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in branched.named_buffers(remove_duplicate=False)]
    found: dict[str, str] = {}
    for name in names:
        if not all(task in group.split("+") for group in _BRANCH.findall(name)):
            continue
        key = _BRANCH.sub("", name).lstrip(".")
        if key not in plain_keys:  # a bare parameter: its layer is the parameter itself
            layer, _, parameter = key.rpartition(".")
            assert layer.rpartition(".")[2] == parameter, f"{name} belongs to nothing in the plain model"
            key = layer
        assert key not in found, f"{found.get(key)} and {name} both stand for {key}"
        found[key] = name
    assert set(found) == plain_keys, f"nothing stands for {plain_keys - set(found)}"
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name, those that a state_dict leaves out too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def plain_model(make: Callable[[], nn.Module], branched: nn.Module, task: str) -> nn.Module:
    """The original architecture loaded with one task's copies."""
    plain = make().train(branched.training)
    own, theirs = state_of(plain), state_of(branched)
    with torch.no_grad():
        for key, name in keys_of(branched, task, set(own)).items():
            assert own[key].shape == theirs[name].shape, key
            own[key].copy_(theirs[name])
    return plain


# What is compared.


def loss_of(output: Any, task: str) -> Tensor:
    """A scalar that depends on every element of a task's output, differently for each task."""
    generator = torch.Generator().manual_seed(ord(task[0]))
    terms = []
    for leaf in tensors_in(output):
        weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        terms.append((leaf * weight).mean() + 0.1 * leaf.square().mean())
    return sum(terms)


def tensors_in(structure: Any) -> list[Tensor]:
    leaves = []
    for leaf in tree_leaves(structure):
        if is_dataclass(leaf):
            leaves += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Tensor):
            assert type(leaf) is not TaskFan, "a task fan reaches the user"
            leaves.append(leaf)
    return leaves


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance`, relative to the largest element."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    assert actual.layout == expected.layout, f"{what} is {actual.layout}"
    actual, expected = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in (actual, expected))
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), what
        return
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    difference = (actual - expected).detach().abs().max().item() if expected.numel() else 0.0
    assert difference <= tolerance * scale, f"{what} differs by {difference:.3g} (scale {scale:.3g})"


def assert_outputs_close(actual: Any, expected: Any, what: str) -> None:
    ours, theirs = tensors_in(actual), tensors_in(expected)
    assert len(ours) == len(theirs), what
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, what)


def check(make: Callable[[], nn.Module], branched: nn.Module, inputs: Any, gradients: bool = True) -> None:
    """Compare one forward (and backward) of a branched model, in the mode it is in, with the plain models'.

    It runs the model: in training mode the running statistics move on.
    """
    plan = plan_of(branched)
    plains = {task: plain_model(make, branched, task) for task in plan.tasks}
    keys = {task: keys_of(branched, task, set(state_of(plain))) for task, plain in plains.items()}
    calls = _count_calls(branched)
    with torch.set_grad_enabled(gradients):
        outputs = call(branched, copy.deepcopy(inputs))
        plain_calls = {task: _count_calls(plain) for task, plain in plains.items()}
        expected = {task: call(plain, copy.deepcopy(inputs))[task] for task, plain in plains.items()}
    for task in plan.tasks:
        assert_outputs_close(outputs[task], expected[task], f"output of {task}")
    if plan.mode == "fan":
        _assert_called_once(calls, plain_calls, plan)
    if gradients:
        branched.zero_grad()
        sum(loss_of(outputs[task], task) for task in plan.tasks).backward()
        for task in plan.tasks:
            loss_of(expected[task], task).backward()
        _assert_gradients(branched, plains, keys)
    # Last: a checkpointed forward runs again in the backward, and moves the statistics on.
    _assert_buffers(branched, plains, keys)


def _assert_gradients(
    branched: nn.Module, plains: Mapping[str, nn.Module], keys: Mapping[str, Mapping[str, str]]
) -> None:
    parameters = dict(branched.named_parameters(remove_duplicate=False))
    expected: dict[Tensor, Tensor] = {}
    for task, plain in plains.items():
        targets: dict[Tensor, Tensor] = {}
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            target = parameters[keys[task][name]]
            assert targets.setdefault(parameter, target) is target, f"{name} is tied no longer"
            assert target.requires_grad == parameter.requires_grad, name
        for parameter, target in targets.items():
            if parameter.grad is not None:
                expected[target] = expected[target] + parameter.grad if target in expected else parameter.grad
    for name, parameter in branched.named_parameters():
        assert (parameter.grad is None) == (parameter not in expected), f"gradient of {name}: {parameter.grad}"
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[parameter], f"gradient of {name}")


def _assert_buffers(
    branched: nn.Module, plains: Mapping[str, nn.Module], keys: Mapping[str, Mapping[str, str]]
) -> None:
    buffers = dict(branched.named_buffers(remove_duplicate=False))
    assert not any(type(buffer) is TaskFan for buffer in buffers.values()), "a task fan is left in a buffer"
    task_modules = plan_of(branched).task_modules
    for task, plain in plains.items():
        # What serves other tasks alone is not run for this one.
        idle = tuple(f"{path}." for path, served in task_modules.items() if task not in served)
        for key, buffer in plain.named_buffers():
            if not key.startswith(idle):
                assert_close(buffers[keys[task][key]], buffer, f"buffer {key} of {task}")


class _Calls(Counter[str]):
    """How often each module ran on values that had not fanned out."""

    fanned: set[str]


def _count_calls(model: nn.Module) -> _Calls:
    calls = _Calls()
    calls.fanned = set()

    def hook(path: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[path] += 1
            if any(type(leaf) is TaskFan for leaf in tree_leaves((args, kwargs))):
                calls.fanned.add(path)

        return count

    handles = [module.register_forward_pre_hook(hook(path), with_kwargs=True) for path, module in model.named_modules()]

    def stop(*_: Any) -> None:
        for handle in handles:
            handle.remove()

    handles.append(model.register_forward_hook(stop))
    return calls


def _assert_called_once(calls: _Calls, plain_calls: Mapping[str, _Calls], plan: BranchPlan) -> None:
    # What lies within a module that keeps statistics by group runs once per group, on values that look plain there.
    within = tuple(f"{path}." for path in plan.statistics)
    counted = {path for path in calls if path not in calls.fanned and path in plain_calls[plan.tasks[0]]}
    counted = {path for path in counted if not path.startswith(within)}
    assert "" in counted
    for path in counted:
        assert all(calls[path] == theirs[path] for theirs in plain_calls.values()), f"{path!r} ran {calls[path]} times"


def assert_no_crosstalk(branched: nn.Module, inputs: Any) -> None:
    """A task's loss gives exactly no gradient to the copies of groups that it is not in."""
    outputs = call(branched, inputs)
    named = dict(branched.named_parameters(remove_duplicate=False))
    for task in plan_of(branched).tasks:
        mine = {p for name, p in named.items() if all(task in g.split("+") for g in _BRANCH.findall(name))}
        others = {name: p for name, p in named.items() if p not in mine and p.requires_grad}
        loss = loss_of(outputs[task], task)
        if others and loss.requires_grad:
            found = torch.autograd.grad(loss, list(others.values()), retain_graph=True, allow_unused=True)
            reached = [name for name, gradient in zip(others, found, strict=True) if gradient is not None]
            assert not reached, f"task {task!r} gives gradient to {reached}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a conversion must leave as it is."""
    return {
        "state": {name: (id(t), t.detach().clone()) for name, t in state_of(model).items()},
        "frozen": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "modules": [(path, id(module), type(module)) for path, module in model.named_modules(remove_duplicate=False)],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, before: Mapping[str, Any]) -> None:
    after = snapshot(model)
    assert torch.equal(after.pop("random"), before["random"]), "the random state has changed"
    states = after.pop("state"), before["state"]
    for (name, (i, now)), (other, (j, then)) in zip(states[0].items(), states[1].items(), strict=True):
        assert (name, i) == (other, j) and torch.equal(now, then), f"{name} has changed"
    assert after == {key: value for key, value in before.items() if key not in ("random", "state")}
