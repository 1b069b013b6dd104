"""Rotations: RotoGrad's part of a model, between the shared features and the tasks' heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrizations import orthogonal

from recon.branching.fans.fan import TaskFan
from recon.branching.fans.trees import value_for
from recon.branching.modules.branch_point import find_branch_point
from recon.branching.partition import Partition
from recon.branching.plan import find_plan
from recon.errors import UsageError
from recon.support.network.forward import check_outputs
from recon.support.network.layers import module_at

NAME = "rotograd"
"""The submodule of the model that holds them."""
LARGEST = 512
"""How many dimensions to rotate at most by default: every step computes a matrix exponential of this size."""

_ORIGINAL = ".parametrizations.weight.original"


@dataclass(frozen=True)
class Feature:
    """What one task's head saw in the latest forward pass."""

    shared: Tensor  # z, before the rotation
    rotated: GradientEdge  # where R z was made: its tensor may be written into later


class Features(dict[str, Feature]):
    """`{task: feature}` of a forward pass: parts of a graph, so copies and files of the model leave them out."""

    def __copy__(self) -> Features:
        return Features(self)

    def __deepcopy__(self, memo: Any) -> Features:
        return Features()

    def __reduce__(self) -> tuple[Any, ...]:
        return Features, ()


class Rotations(nn.Module):
    """One orthogonal matrix R a task; the task's head sees R z where the layer gives the shared features z.

    A submodule of the model, so that its state goes wherever the model's goes: `rotograd.<layer>.<task>...`, with
    slashes for the dots of the layer's path. The first forward pass makes the matrices, when it shows
    their size; so does loading a state. They start as identities.

    z's dimension of features is the last, or the channels of images and volumes (four dimensions and more). The first
    `size` of them are rotated; with 0 all, up to `LARGEST`. Without `tasks`, the state that is loaded names them.
    Without `layer`, the module whose output is z, the first forward pass finds it.
    """

    def __init__(self, tasks: Sequence[str] = (), layer: str = "", size: int = 0) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.size = size
        self.features = Features()
        self._asked = layer
        self._searching = False
        self.register_load_state_dict_pre_hook(_make_from_state)

    @property
    def layer(self) -> str:
        """The path of the module whose output is z; empty until it is found."""
        return next(iter(self._modules)).replace("/", ".") if self.made else self._asked

    @property
    def made(self) -> bool:
        """Whether the matrices are there."""
        return bool(self._modules)

    def matrix(self, task: str) -> Tensor:
        """A task's R, orthogonal by its parametrization."""
        with _no_autocast():
            R = self.get_submodule(f"{_segment(self.layer)}.{task}").weight
        assert isinstance(R, Tensor)
        return R

    def turn(self, value: Tensor, task: str, back: bool = False) -> Tensor:
        """R z, or Rᵀ z if `back`; the matrix counts as a constant."""
        with torch.no_grad():
            R = self.matrix(task).to(value)
        features = by_feature(value)
        turned = features[..., : len(R)] @ (R if back else R.T)
        if len(R) < features.shape[-1]:
            turned = torch.cat([turned, features[..., len(R) :]], dim=-1)
        if value.ndim < 4:
            return turned
        # Not a view: a write into a view (by an activation in place) would change where its gradient is found.
        return turned.movedim(-1, 1).clone(memory_format=torch.contiguous_format)

    def before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: forget the last pass; in the first, find the layer and hook onto it."""
        if self._searching:
            return
        self.features.clear()
        if not self.layer:
            self._searching = True
            try:
                found = find_branch_point(model, self.tasks, args, kwargs)
            finally:
                self._searching = False
            self._asked = found
        layer = module_at(model, self.layer)
        if self.after_layer not in layer._forward_hooks.values():
            layer.register_forward_hook(self.after_layer)
            model.register_forward_hook(self.after_model)

    def after_layer(self, layer: nn.Module, args: Any, output: Any) -> TaskFan:
        """Forward hook of the layer: hand out every task's own view of the features."""
        shared = self._by_task(output)
        if self.features:
            raise UsageError(
                f"The layer {self.layer!r} runs more than once in a forward pass, so its output is not the tasks' "
                "shared features. Name a layer that runs once: rotograd:layer=NAME."
            )
        self._make(shared[self.tasks[0]])
        turned = {task: self.turn(z, task) for task, z in shared.items()}
        if torch.is_grad_enabled() and all(value.requires_grad for value in turned.values()):
            self.features.update({t: Feature(shared[t], get_gradient_edge(turned[t])) for t in self.tasks})
        return TaskFan(Partition.per_task(self.tasks), list(turned.values()))

    def after_model(self, model: nn.Module, args: Any, output: Any) -> dict[str, Any]:
        """Forward hook of the model: each task's entry of the output holds that task's value."""
        output = check_outputs(output, self.tasks)
        # In the order of the model's output: a loaded state does not say in which order the tasks come.
        return {task: value_for(value, task) for task, value in output.items() if task in self.tasks}

    def _by_task(self, output: Any) -> dict[str, Tensor]:
        if not isinstance(output, Tensor) or output.ndim < 2:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"The output of the layer {self.layer!r} must be one tensor of features (N, D), (N, L, D) or "
                f"(N, C, H, W), but is {got}. Name another layer: rotograd:layer=NAME."
            )
        if type(output) is not TaskFan:
            return dict.fromkeys(self.tasks, output)
        missing = [task for task in self.tasks if task not in output._partition.label_of]
        if missing:
            raise UsageError(
                f"The layer {self.layer!r} serves the tasks {list(output._partition.tasks)} only, not {missing}. Name "
                "a layer whose output all tasks use: rotograd:layer=NAME."
            )
        return {task: output.for_group((task,)) for task in self.tasks}

    def _make(self, value: Tensor) -> None:
        count = value.shape[feature_dimension(value)]
        if not self.made:
            if self.size > count:
                raise UsageError(f"rotograd:size is {self.size}, but {self.layer!r} has only {count} features.")
            self._fill(torch.empty(self.size or min(count, LARGEST), dtype=_real(value), device=value.device))
        elif next(self.parameters()).device != value.device:
            self.to(value.device)

    def _fill(self, like: Tensor) -> None:
        """Make a matrix for each task: as many rows as `like`, on its device and of its dtype."""
        holder = nn.Module()
        for task in self.tasks:
            matrix = nn.utils.skip_init(
                nn.Linear, len(like), len(like), bias=False, dtype=like.dtype, device=like.device
            )
            nn.init.eye_(matrix.weight)
            with _no_autocast():
                holder._modules[task] = orthogonal(matrix)
        self._modules[_segment(self._asked)] = holder


def attach_rotations(model: nn.Module, tasks: Sequence[str] = (), layer: str = "", size: int = 0) -> Rotations:
    """Put rotations into a model, or find those that it has."""
    known = getattr(model, NAME, None)
    if isinstance(known, Rotations):
        for what, there, wanted in (("tasks", sorted(known.tasks), sorted(tasks)), ("layer", known.layer, layer)):
            if wanted and there and there != wanted:
                raise UsageError(f"The model has rotations already, with the {what} {there!r}, not {wanted!r}.")
        known.tasks = tuple(tasks) or known.tasks
        return known
    if known is not None:
        raise UsageError(f"The model has an attribute {NAME!r} of its own, the name of RotoGrad's part. Rename it.")
    plan = find_plan(model)
    if plan and plan.mode != "fan":
        raise UsageError(
            "The model runs once per task (mode='per-task'), so its tasks have no features in common. Convert it with "
            "mode='fan', or choose another method."
        )
    if layer:
        module_at(model, layer)
    rotations = Rotations(tasks, layer, size)
    model.add_module(NAME, rotations)
    model.register_forward_pre_hook(rotations.before_forward, with_kwargs=True)
    return rotations


def refuse_rotations(model: nn.Module) -> None:
    """Raise UsageError if the model holds rotations."""
    if isinstance(getattr(model, NAME, None), Rotations):
        raise UsageError(
            "The model was trained by RotoGrad: each task sees the shared features through its own rotation, which the "
            "original architecture does not have. Branch the model before RotoGrad is attached to it."
        )


def feature_dimension(value: Tensor) -> int:
    """Which of its dimensions holds the features."""
    return 1 if value.ndim >= 4 else value.ndim - 1


def by_feature(value: Tensor) -> Tensor:
    """A view with the features last."""
    return value.movedim(feature_dimension(value), -1)


def _segment(layer: str) -> str:
    """A layer's path as one part of a key."""
    return layer.replace(".", "/")


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Turn autocast off: computed with half the bits, no matrix stays orthogonal."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _real(value: Tensor) -> torch.dtype:
    # The features may come from code under autocast, with half the bits.
    return torch.promote_types(value.dtype, torch.float32)


def _make_from_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a model load a state that was saved with rotations in it."""
    assert isinstance(module, Rotations)
    found = {
        key[len(prefix) :].removesuffix(_ORIGINAL): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and key.endswith(_ORIGINAL)
    }
    if not found or module.made:
        return
    names = [name.rpartition(".") for name in found]
    layer, tasks = names[0][0].replace("/", "."), tuple(task for _, _, task in names)
    if (module.tasks and set(module.tasks) != set(tasks)) or (module.layer and module.layer != layer):
        return  # load_state_dict reports the missing and unexpected entries
    module.tasks, module._asked = module.tasks or tasks, layer
    module._fill(next(iter(found.values())))
