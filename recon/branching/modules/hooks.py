"""The forward hooks that `convert` registers on the user's modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from recon.branching.fans.trees import restrict, value_for
from recon.branching.partition import Group
from recon.support.network.forward import check_outputs


class TasksOnly:
    """Forward pre-hook of a module that serves some tasks only: it sees no other task's values.

    Code that swaps a module for another (torch.ao's quantization, say) moves the hooks to the new one, and may forget
    that they take keyword arguments: this one works with and without.
    """

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> tuple[Any, ...]:
        """Restrict the fans among the inputs."""
        args = restrict(args, self.tasks)
        return args if kwargs is None else (args, restrict(kwargs, self.tasks))


class SplitOutputs:
    """Forward hook of the whole model: each task's entry of the output holds that task's value."""

    def __init__(self, tasks: Group) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: Any, *others: Any) -> dict[str, Any]:
        """Take the fans apart."""
        output = check_outputs(others[-1], self.tasks)  # after the keyword arguments, if the hook gets them
        return {task: value_for(output[task], task) for task in self.tasks}
