"""What the tasks' losses depend on, read off the autograd graph without computing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import Node

from recon.errors import GradientError
from recon.opaque_nodes import Edge, edges_behind, hidden_reach, is_compiled, is_opaque


@dataclass(frozen=True)
class Reach:
    """What each task of a step reaches.

    Args:
        parameters: `{task: trainable parameters}` that the task's loss depends on; the tasks in the order of the rows.
        shared: those that two tasks or more depend on.
        outside: `{task: other leaves}` that want a gradient and are none of the parameters: a learned temperature of
            the loss, an input.
    """

    parameters: Mapping[str, list[nn.Parameter]]
    shared: list[nn.Parameter]
    outside: Mapping[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of_tasks(
        cls,
        reached: Mapping[str, set[nn.Parameter]],
        parameters: Iterable[nn.Parameter],
        outside: Mapping[str, list[Tensor]],
    ) -> Reach:
        """From a set for each task; everything in the order of `parameters`."""
        parameters = list(parameters)
        counts = Counter(p for found in reached.values() for p in found)
        by_task = {task: [p for p in parameters if p in found] for task, found in reached.items()}
        return cls(by_task, [p for p in parameters if counts[p] > 1], outside)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.parameters)

    def shared_layers(self, layer_of: Mapping[Tensor, int]) -> list[int]:
        """The layers that two tasks or more reach, by whichever of their parameters, in order of their numbers."""
        tasks_of = Counter(layer for found in self.parameters.values() for layer in {layer_of[p] for p in found})
        return sorted(layer for layer, tasks in tasks_of.items() if tasks > 1)


def find_reach(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> Reach:
    """What the losses of one step depend on.

    Raises:
        GradientError: a loss does not depend on any of the parameters, or on some of them in a hidden way.
        UsageError: a part of the model, scripted say, hides which of its parameters each loss depends on.
    """
    trainable = {p: None for p in parameters if p.requires_grad}  # ordered, and quick to look up
    reached: dict[str, set[nn.Parameter]] = {}
    outside: dict[str, list[Tensor]] = {}
    met: list[set[Edge]] = []
    for task, loss in losses.items():
        nodes, opaque = _graph([loss])
        met.append(opaque)
        _refuse_reentrant_checkpoints(nodes)
        leaves = _leaves([loss], nodes)
        reached[task] = {leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and leaf in trainable}
        outside[task] = [leaf for leaf in leaves if leaf not in trainable]
        if not reached[task]:
            raise GradientError(no_gradient(task))
    parting = _parting(met)
    for node, output in set().union(*met):
        if node is not None and node in parting and edges_behind(node, output) is None:
            raise hidden_reach(node)
    return Reach.of_tasks(reached, trainable, outside)


def no_gradient(task: str) -> str:
    """What to say of a task whose loss has no gradient."""
    return (
        f"The loss of task {task!r} depends on no trainable parameter of the model, so it has no gradient. Check that "
        "it uses the model's output for this task, without detach() or no_grad(), and that not all of its layers are "
        "frozen."
    )


def reached_leaves(values: Sequence[Tensor]) -> set[Tensor]:
    """The leaf tensors that `values` depend on."""
    return set(_leaves(values, _nodes(values)))


def last_uses(values: Sequence[Tensor]) -> dict[Tensor, int]:
    """When the forward pass used each leaf behind `values` for the last time: a number that grows as it proceeds."""
    uses: dict[Tensor, int] = {}
    for node in _nodes(values):
        for leaf in _leaves([], [used for used, _ in node.next_functions if used is not None]):
            uses[leaf] = max(uses.get(leaf, -1), node._sequence_nr())
    return uses


def used_at_once(values: Sequence[Tensor]) -> set[Tensor]:
    """The leaves behind `values` that a compiled part of the model uses: in which order, autograd does not know."""
    compiled = [node for node in _nodes(values) if is_compiled(node)]
    return set(_leaves([], [used for node in compiled for used, _ in node.next_functions if used is not None]))


def compiled_as_one(losses: Mapping[str, Tensor]) -> bool:
    """Whether what two tasks do not share, their heads say, is computed by one compiled part of the model."""
    return any(map(is_compiled, _parting([_graph([loss])[1] for loss in losses.values()])))


def _parting(met: Iterable[set[Edge]]) -> list[Node]:
    """The opaque nodes of which two tasks use different outputs, by what each of the tasks has met."""
    used: dict[Node, set[frozenset[int]]] = {}
    for edges in met:
        outputs: dict[Node, set[int]] = {}
        for node, output in edges:
            if node is not None:
                outputs.setdefault(node, set()).add(output)
        for node, numbers in outputs.items():
            used.setdefault(node, set()).add(frozenset(numbers))
    return [node for node, different in used.items() if len(different) > 1]


def leaves_before(values: Sequence[Tensor], stops: Collection[Node]) -> tuple[list[Tensor], set[Node]]:
    """The leaf tensors that `values` depend on by another way than through `stops`, and the stops that are met."""
    nodes = _nodes(values, stops)
    return _leaves(values, nodes), {node for node in nodes if node in stops}


def _nodes(values: Sequence[Tensor], stops: Collection[Node] = ()) -> dict[Node, None]:
    """The graph behind `values`, in the order in which it is met; what lies behind the `stops` is not looked at."""
    return _graph(values, stops)[0]


def _graph(values: Sequence[Tensor], stops: Collection[Node] = ()) -> tuple[dict[Node, None], set[Edge]]:
    """The nodes, see `_nodes`, and those outputs of opaque ones that `values` depend on."""
    seen: dict[Node, None] = {}
    met: set[Edge] = set()
    stack: list[Edge] = [(v.grad_fn, v.output_nr) for v in values]
    while stack:
        node, output = edge = stack.pop()
        if node is None:
            continue
        if is_opaque(node):  # what lies behind it is another for each output
            if edge not in met:
                met.add(edge)
                seen[node] = None
                if node not in stops:
                    behind = edges_behind(node, output)
                    stack += node.next_functions if behind is None else behind
        elif node not in seen:
            seen[node] = None
            if node not in stops:
                stack += node.next_functions
    return seen, met


def _leaves(values: Sequence[Tensor], nodes: Iterable[Node]) -> list[Tensor]:
    alone = [v for v in values if v.grad_fn is None and v.requires_grad]
    return alone + [node.variable for node in nodes if hasattr(node, "variable")]


def _refuse_reentrant_checkpoints(nodes: Iterable[Node]) -> None:
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise GradientError(
            "A part of the model runs under torch.utils.checkpoint with use_reentrant=True, which hides its parameters "
            "from the graph, so that no task's gradient there can be told. Pass use_reentrant=False."
        )
