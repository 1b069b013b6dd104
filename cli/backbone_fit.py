"""What makes another network for a problem, if it fits: a backbone of recon's, or a user's. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recon import models
from recon.batches import task_outputs, unpack
from recon.errors import ProblemError, UsageError
from recon.evaluation import eval_mode
from recon.problem import Problem
from recon.problems import call_function


def maker(name: str, problem: Problem) -> Callable[[], nn.Module]:
    """What makes the backbone, as `Problem.make_model`.

    Raises:
        UsageError: it does not fit the problem.
    """
    return _user_s(name) if ":" in name else _built_in(name, problem)


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
