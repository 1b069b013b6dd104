"""verify: check on a batch that a branched model computes, for each task, the original with the task's copies."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recon.branching.modules.branched import Branched, BranchedParameter
from recon.branching.modules.statistics import BranchedStatistics
from recon.branching.plan import plan_of
from recon.branching.surgery.copies import copy_model
from recon.errors import VerificationError
from recon.support.network.forward import call, check_outputs
from recon.support.network.state import perturb, state_kept
from recon.support.network.trees import leaves_of

# By the precision of the weights. The two models run the same operations, but gradients are summed in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_LOW_PRECISION_TOLERANCE = 1e-2
_BRANCH = re.compile(r"(?P<path>.*\.)?branches\.(?P<group>[^.]+)\.(?P<inner>.*)")


@dataclass
class Verification:
    """The largest differences between a branched model and the original with each task's copies.

    Args:
        tolerance: what a difference must stay below.
        modes: the modes in which the two were compared. A mode in which Python's random numbers steer the forward
            is left out; dropout is no obstacle.
        outputs: the largest difference in a task's output, as a fraction of its largest entry.
        gradients: in the gradient of a task's output, as a fraction of the largest entry of any of its gradients.
        statistics: in a buffer after a training forward, as a fraction of its largest entry.
    """

    tolerance: float
    modes: tuple[str, ...] = ()
    outputs: float = 0.0
    gradients: float = 0.0
    statistics: float = 0.0

    def __str__(self) -> str:
        if not self.modes:
            return "Not verified: Python's random numbers steer the model's forward."
        return (
            f"Verified in {' and '.join(self.modes)} mode against the original with each task's copies. Largest "
            f"differences, relative: outputs {self.outputs:.1g}, gradients {self.gradients:.1g}, running statistics "
            f"{self.statistics:.1g}."
        )

    def note(self, kind: str, name: str, actual: Tensor | None, expected: Tensor | None, scale: float, at: str) -> None:
        """Record one difference.

        Raises:
            VerificationError: it is larger than rounding explains.
        """
        difference = _distance(actual, expected) / (scale or 1.0)
        if not difference <= self.tolerance:
            raise VerificationError(
                f"The branched model does not compute what it must: {at}, the {kind} at {name} differ by "
                f"{difference:.1e} from those of the original network with this task's copies, relative to the largest "
                "entry. Convert with mode='per-task', and please report the model."
            )
        setattr(self, kind, max(getattr(self, kind), difference))


def verify(model: nn.Module, branched: nn.Module, example_inputs: Any) -> Verification:
    """Check that each task gets what the original architecture with its copies would give it.

    First, on a copy, all weights are changed a little, so that no two copies of a layer are equal. They are then
    loaded into `model`'s architecture by their names, for one task after the other, and both run: outputs,
    the gradients of a fixed combination of their entries, and the running statistics afterwards are compared, in
    evaluation and in training mode. Copies that serve other tasks must get no gradient.

    Args:
        model: the unbranched model. Its weights do not matter; it is left untouched.
        branched: what `recon.convert` made of it; left untouched.
        example_inputs: as for `recon.convert`.

    Raises:
        PlanError: `branched` is not branched.
        VerificationError: a difference is larger than rounding explains.
    """
    plan = plan_of(branched)
    twin, plain = copy_model(branched), copy_model(model)
    perturb(twin)
    found = Verification(_tolerance(model))
    for training, mode in ((False, "evaluation"), (True, "training")):
        twin.train(training)
        plain.train(training)
        if _decides_at_random(plain, example_inputs):
            continue
        for task in plan.tasks:
            with state_kept(twin), state_kept(plain), torch.enable_grad(), _SameDraws():
                _compare(found, plain, twin, copy.deepcopy(example_inputs), task, f"in {mode} mode, for task {task!r}")
        found.modes += (mode,)
    return found


def _compare(found: Verification, plain: nn.Module, twin: nn.Module, inputs: Any, task: str, at: str) -> None:
    mine, theirs = _state_of_task(twin, task), dict(_named_state(plain))
    with torch.no_grad():
        for name, tensor in theirs.items():
            if name in mine:
                tensor.copy_(mine[name])
    outputs = _outputs(twin, inputs, task), _outputs(plain, inputs, task)
    for i, (actual, expected) in enumerate(zip(*outputs, strict=True)):
        found.note("outputs", f"tensor {i}", actual, expected, _size(expected), at)
    idle = tuple(f"{path}." for path, served in (plan_of(twin).task_modules or {}).items() if task not in served)
    mine = _state_of_task(twin, task)  # again: the forward may have replaced a buffer
    for name, buffer in plain.named_buffers():
        if name in mine and not name.startswith(idle):  # heads of other tasks are not run for this one
            found.note("statistics", name, mine[name], buffer, _size(buffer), at)
    for model, out in zip((twin, plain), outputs, strict=True):
        model.zero_grad()
        loss = _combination(out)
        if loss.requires_grad:
            loss.backward()
    scale = max((_size(p.grad) for p in plain.parameters()), default=0.0)
    for name, parameter in plain.named_parameters():
        found.note("gradients", name, mine[name].grad, parameter.grad, scale, at)
    used = set(mine.values())
    for name, parameter in twin.named_parameters():
        if parameter not in used:
            found.note("gradients", name, parameter.grad, None, scale, at)


def _outputs(model: nn.Module, inputs: Any, task: str) -> list[Tensor]:
    output = check_outputs(call(model, copy.deepcopy(inputs)), (task,))[task]
    return [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]


def _combination(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every entry differently."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for out in outputs:
        if out.is_floating_point():
            weight = torch.randn(out.shape, generator=generator).to(out)
            total = total.to(out) + (out * weight).mean()
    return total


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _state_of_task(branched: nn.Module, task: str) -> dict[str, Tensor]:
    """`{name in the original architecture: tensor}`, what the task uses, found by the names of the state alone."""
    paths = {
        path: isinstance(part, BranchedParameter)
        for path, part in branched.named_modules(remove_duplicate=False)
        if isinstance(part, (Branched, BranchedStatistics))
    }
    state = {}
    for name, tensor in _named_state(branched):
        while match := _BRANCH.match(name):  # the innermost first: copies may keep statistics by group in turn
            path = (match["path"] or "").removesuffix(".")
            if path not in paths or task not in match["group"].split("+"):
                break
            name = path if paths[path] else f"{match['path'] or ''}{match['inner']}"
        if not match or path not in paths:
            state[name] = tensor
    return state


class _SameDraws(TorchDispatchMode):
    """Every random operation draws the same numbers for the same shape, so that both models drop the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(0)
        return func(*args, **(kwargs or {}))


def _decides_at_random(model: nn.Module, inputs: Any) -> bool:
    """Whether Python's or numpy's random numbers steer the forward: two models would go different ways."""
    before, numpy_before = random.getstate(), np.random.get_state()
    try:
        with state_kept(model), torch.no_grad():
            call(model, copy.deepcopy(inputs))
        return random.getstate() != before or str(np.random.get_state()) != str(numpy_before)
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _tolerance(model: nn.Module) -> float:
    return max(
        (_TOLERANCE.get(p.dtype, _LOW_PRECISION_TOLERANCE) for p in model.parameters() if p.is_floating_point()),
        default=0.0,
    )


def _distance(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        return _size(actual) + _size(expected)
    if actual.shape != expected.shape:
        return float("inf")
    if actual.is_sparse and expected.is_sparse:
        actual, expected = actual.coalesce(), expected.coalesce()
        if torch.equal(actual.indices(), expected.indices()):
            return _distance(actual.values(), expected.values())
        return _size(actual.to(torch.float64) - expected.to(torch.float64))
    if actual.is_sparse or expected.is_sparse:
        return _distance(actual.to_dense(), expected.to_dense())
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return _size(torch.where(same, 0, actual.to(torch.float64) - expected.to(torch.float64)))


def _size(tensor: Tensor | None) -> float:
    if tensor is not None and tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return 0.0 if tensor is None or not tensor.numel() else tensor.detach().abs().max().item()
