"""What the surgery hooks onto modules of the user's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from recon.batches import check_outputs
from recon.fan_trees import restrict, value_for
from recon.partition import Group


class TasksOnly:
    """Forward pre-hook of a module that serves some tasks only: it sees no other task's values."""

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Restrict the fans among the inputs."""
        return restrict(args, self.tasks), restrict(kwargs, self.tasks)


class SplitOutputs:
    """Forward hook of the whole model: each task's entry of the output holds that task's value."""

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> dict[str, Any]:
        """Take the fans apart."""
        output = check_outputs(output, self.tasks)
        return {task: value_for(output[task], task) for task in self.tasks}
