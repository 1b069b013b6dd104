"""Give a problem another network, one of recon's or a user's, and check that it fits. Imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recon import models
from recon.errors import ProblemError, ReconError, UsageError, shortened
from recon.experiments.inputs import example_inputs
from recon.problems import call_function
from recon.problems.problem import Problem
from recon.support.network.forward import task_outputs
from recon.support.random_states import global_states_kept
from recon.training.evaluation import eval_mode

Shapes = dict[str, tuple[int, ...]]
"""`{task name: shape of its output}`; `()` for an output that is not a tensor."""

_KINDS = {
    "images": "takes images (N, C, H, W) and gives logits (N, classes)",
    "dense": "takes images (N, C, H, W) and gives maps (N, channels, H, W)",
    "vectors": "takes vectors (N, F) and gives logits (N, classes)",
}


def is_own(name: str) -> bool:
    """Whether a backbone is a function of the user's: code that the user must name, and no file may."""
    return ":" in name


def backbone_title(problem: Problem, model: nn.Module) -> str:
    """What a conflict map calls the problem's network: recon's name of it, else that of its class."""
    return problem.backbone if problem.backbone in models.__all__ else type(model).__name__


def with_backbone(problem: Problem, name: str) -> Problem:
    """The problem with another network; the same problem if the name is empty.

    Raises:
        UsageError: the backbone does not fit the problem.
        ProblemError: the problem's code raised.
    """
    if not name:
        return problem
    return replace(problem, make_model=_maker(name, problem), backbone=name)


def _maker(name: str, problem: Problem) -> Callable[[], nn.Module]:
    """What makes the backbone, as `Problem.make_model`.

    One of recon's gets heads as wide as those of the problem's own network. A user's function is not asked yet: it is
    when it makes its first model that it is found not to fit.
    """
    if is_own(name):
        return _UserBackbone(name, problem)
    with global_states_kept():
        return _built_in(name, problem)


class _UserBackbone:
    def __init__(self, name: str, problem: Problem) -> None:
        self.name, self.problem = name, problem
        # Only the user knows what their own problem accepts, and this is no reason to read its data.
        self.checked = problem.example_inputs is None

    def __call__(self) -> nn.Module:
        model = call_function(self.name)
        if not isinstance(model, nn.Module):
            raise ProblemError(f"{self.name} must return a torch.nn.Module, but it returned {type(model).__name__}.")
        if not self.checked:
            with global_states_kept():
                self._check(model)
            self.checked = True
        return model

    def _check(self, model: nn.Module) -> None:
        inputs = example_inputs(self.problem, seed=0)
        got, expected = (_shapes(m, inputs, self.problem) for m in (model, self.problem.make_model()))
        wrong = {task: shape for task, shape in got.items() if shape != expected[task]}
        if wrong:
            raise UsageError(
                f"{self.name} gives {_shapes_text(wrong)}, but {self.problem.name!r} has {_inputs_text(inputs)} and "
                f"needs {_shapes_text({task: expected[task] for task in wrong})}."
            )


def _built_in(name: str, problem: Problem) -> Callable[[], nn.Module]:
    inputs = example_inputs(problem, seed=0)
    inputs = inputs[:2] if isinstance(inputs, Tensor) else inputs
    expected = _shapes(problem.make_model(), inputs, problem)
    kind = _kind(inputs, expected)
    needs = f"but {problem.name!r} has {_inputs_text(inputs)} and needs {_shapes_text(expected)}"
    if kind is None or models.KINDS.get(name, kind) != kind:
        does = _KINDS.get(models.KINDS.get(name, ""), "takes images or vectors, and gives logits or maps")
        raise UsageError(f"The backbone {name} {does}, {needs}. {_others(name, kind)}")
    backbone, settings = getattr(models, name), _settings(getattr(models, name), inputs)
    channels = {task: shape[1] for task, shape in expected.items()}

    def make_model() -> nn.Module:
        return backbone(channels, **settings)

    try:
        got = _shapes(make_model(), inputs, problem)
    except Exception as error:
        what = str(error) if isinstance(error, ReconError) else f"{type(error).__name__}: {error}."
        raise UsageError(
            f"The backbone {name} does not fit {problem.name!r}, which has {_inputs_text(inputs)}. {what} "
            f"{_others(name, kind)}"
        ) from error
    if got != expected:
        wrong = {task: shape for task, shape in got.items() if shape != expected[task]}
        raise UsageError(f"The backbone {name} gives {_shapes_text(wrong)}, {needs}. {_others(name, kind)}")
    return make_model


def _shapes(model: nn.Module, inputs: Any, problem: Problem) -> Shapes:
    with eval_mode(model), torch.no_grad():
        outputs = task_outputs(model, inputs, problem.task_names)
    return {task: tuple(getattr(outputs[task], "shape", ())) for task in problem.task_names}


def _kind(inputs: Any, outputs: Shapes) -> str | None:
    """The kind of backbone, by `recon.models.KINDS`, that gives such outputs; None if no kind does."""
    if not isinstance(inputs, Tensor) or not all(len(shape) > 1 for shape in outputs.values()):
        return None
    samples, dimensions = len(inputs), {len(shape) for shape in outputs.values()}
    if any(shape[0] != samples for shape in outputs.values()):
        return None
    if inputs.ndim == 4 and {shape[2:] for shape in outputs.values()} == {inputs.shape[2:]}:
        return "dense"
    return {4: "images", 2: "vectors"}.get(inputs.ndim) if dimensions == {2} else None


def _settings(backbone: Callable[..., nn.Module], inputs: Tensor) -> dict[str, Any]:
    if inputs.ndim == 2:
        return {"in_features": inputs.shape[1]}
    sized = "image_size" in inspect.signature(backbone).parameters
    return {"in_channels": inputs.shape[1], **({"image_size": tuple(inputs.shape[2:])} if sized else {})}


def _others(name: str, kind: str | None) -> str:
    own = "your own function, path/to/file.py:function"
    known = [other for other in models.__all__ if kind and models.KINDS.get(other) == kind and other != name]
    return f"Choose {', '.join(known)}, or {own}." if known else f"Choose {own}."


def _inputs_text(inputs: Any) -> str:
    shapes = [str(tuple(leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return f"inputs {shortened(shapes) or 'without tensors'}"


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return shortened(f"{shape or 'no tensor'} for task {task!r}" for task, shape in shapes.items())
