"""Other networks for a problem: recon's own backbones, and what a user's function makes. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from recon import models
from recon.batches import task_outputs, unpack
from recon.errors import ProblemError, UnknownNameError, UsageError
from recon.evaluation import eval_mode
from recon.problem import Problem
from recon.problems import call_function


def backbone_name(text: str) -> str:
    """The backbone that `--model` names, as a run keeps it; empty if it names a folder.

    Raises:
        UnknownNameError: it is neither.
    """
    if text in models.__all__ and not Path(text).exists():
        return text
    target, colon, function = text.rpartition(":")
    if colon and not Path(text).exists():
        return f"{Path(target).resolve()}:{function}" if target.endswith(".py") else text
    if Path(text).exists() or Path(text).name != text:
        return ""
    raise UnknownNameError(
        "folder or backbone",
        text,
        [*models.__all__, *sorted(path.name for path in Path().iterdir() if path.is_dir())],
        "A backbone of your own is named path/to/file.py:function, where the function returns a module.",
    )


def with_backbone(problem: Problem, name: str) -> Problem:
    """The problem with another network; the same problem if the name is empty.

    Raises:
        UsageError: the backbone does not fit the problem, or there is no such function.
        ProblemError: the user's code raised.
    """
    if not name:
        return problem
    return replace(problem, make_model=_user_s(name) if ":" in name else _built_in(name, problem))


def _user_s(name: str) -> Callable[[], nn.Module]:
    def make_model() -> nn.Module:
        model = call_function(name)
        if not isinstance(model, nn.Module):
            raise ProblemError(f"{name} must return a torch.nn.Module, but it gave {type(model).__name__}.")
        return model

    return make_model


def _built_in(name: str, problem: Problem) -> Callable[[], nn.Module]:
    """What makes the backbone, with heads as wide as those of the problem's own network."""
    backbone, own = getattr(models, name), problem.make_model
    inputs, _ = unpack(next(iter(problem.make_loaders(0)[0])))
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise UsageError(f"The backbone {name} takes images (N, C, H, W), which {problem.name!r} does not give.")
    model = own()
    with eval_mode(model), torch.no_grad():
        outputs = task_outputs(model, inputs[:2], problem.task_names)
    for task in problem.task_names:
        if not isinstance(outputs[task], Tensor) or outputs[task].ndim != 2:
            raise UsageError(
                f"The backbone {name} gives each task logits (N, classes), but task {task!r} of {problem.name!r} wants "
                "something else. Pass a function of your own: --model path/to/file.py:function."
            )
    classes = {task: outputs[task].shape[1] for task in problem.task_names}
    return lambda: backbone(classes, in_channels=inputs.shape[1])
