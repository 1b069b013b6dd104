"""Find the branch point: the last module whose output all tasks use, and after which they share nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from recon.branching.fans.fan import TaskFan
from recon.branching.fans.trees import value_for
from recon.errors import UsageError
from recon.support.network.forward import check_outputs
from recon.support.network.graph import leaves_before
from recon.support.network.hooks import hooked
from recon.support.network.state import state_kept
from recon.support.network.trees import leaves_of

Nodes = Mapping[str, Node]
"""`{task: where its part of the graph begins}`."""


def find_branch_point(model: nn.Module, tasks: Sequence[str], args: Any, kwargs: Any) -> str:
    """The path of the branch point, found by a dry forward on these inputs."""
    seen: dict[str, Nodes | None] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A module that runs twice has two outputs.
            seen[path] = None if path in seen else _nodes_of(output, tasks)

        return hook

    hooks = (
        module.register_forward_hook(watch(path))
        for path, module in model.named_modules()
        if path and not isinstance(module, torch.jit.ScriptModule)
    )
    with hooked(hooks), state_kept(model), torch.enable_grad():
        outputs = check_outputs(model(*args, **kwargs), tasks)
        values = {
            task: [leaf for leaf in leaves_of(value_for(outputs[task], task)) if isinstance(leaf, Tensor)]
            for task in tasks
        }
    for path, nodes in reversed(seen.items()):
        if nodes is not None and _cuts(values, nodes):
            return path
    raise UsageError(
        "There is no module whose output all tasks' losses depend on and after which the tasks share no layer, so the "
        "shared features cannot be found. Move all that the tasks share, and nothing else, into one submodule, and "
        "name it: rotograd:layer=NAME."
    )


def leaves_behind(values: Mapping[str, Sequence[Tensor]], nodes: Nodes) -> dict[str, list[Tensor]]:
    """`{task: leaves}` that each task's output, or loss, reaches without passing the `nodes` of the features."""
    behind = {}
    for task, found in values.items():
        behind[task], met = leaves_before(found, {nodes[task]})
        if not met:
            raise UsageError(
                f"The loss of task {task!r} does not depend on the features of this forward pass. Name a layer whose "
                "output all tasks use (rotograd:layer=NAME), and run the model once for each backward."
            )
    return behind


def shared_leaves(behind: Mapping[str, Sequence[Tensor]]) -> set[Tensor]:
    """The parameters that two tasks or more reach."""
    counts = Counter(leaf for leaves in behind.values() for leaf in set(leaves) if isinstance(leaf, nn.Parameter))
    return {leaf for leaf, count in counts.items() if count > 1}


def _cuts(values: Mapping[str, Sequence[Tensor]], nodes: Nodes) -> bool:
    try:
        return not shared_leaves(leaves_behind(values, nodes))
    except UsageError:
        return False


def _nodes_of(output: Any, tasks: Sequence[str]) -> Nodes | None:
    if not isinstance(output, Tensor) or output.ndim < 2:
        return None
    if type(output) is not TaskFan:
        return None if output.grad_fn is None else dict.fromkeys(tasks, output.grad_fn)
    if not set(tasks) <= set(output._partition.tasks):
        return None
    nodes = {task: output.for_group((task,)).grad_fn for task in tasks}
    return None if None in nodes.values() else nodes  # type: ignore[return-value]
