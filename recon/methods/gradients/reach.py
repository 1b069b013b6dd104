"""What the tasks' losses depend on, read off the autograd graph without computing anything.

Where several processes train one model, the rules are those of DistributedDataParallel: each rank brings its own part
of the batch, and every gradient is the mean over the ranks; a rank without one counts as zero. Task gradients are
averaged before cosines or updates are computed, so each rank computes the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from recon.errors import GradientError, UsageError
from recon.methods.gradients.held import held
from recon.methods.gradients.sparse import average_gradients, no_rows
from recon.support.network.graph import graph_behind, leaves_among
from recon.support.network.opaque_nodes import Edge, edges_behind, how_hidden, is_compiled
from recon.support.network.tables import lookup_tables
from recon.support.processes import average_, gather, world_size


@dataclass(frozen=True)
class Reach:
    """What each task of a step reaches: the trainable `parameters` that its loss depends on, in the order of the rows.

    `outside` are the other leaves that require a gradient: a learned temperature of the loss, an input. `tables` are
    the parameters of which all tasks only look rows up, whose gradients are sparse (`nn.Embedding(sparse=True)`).
    """

    parameters: Mapping[str, list[nn.Parameter]]
    shared: list[nn.Parameter]  # those that two tasks or more depend on
    outside: Mapping[str, list[Tensor]] = field(default_factory=dict)
    tables: frozenset[nn.Parameter] = frozenset()

    @classmethod
    def of_tasks(
        cls,
        reached: Mapping[str, set[nn.Parameter]],
        parameters: Iterable[nn.Parameter],
        outside: Mapping[str, list[Tensor]],
        tables: Iterable[nn.Parameter] = (),
    ) -> Reach:
        """From a set for each task; everything in the order of `parameters`."""
        parameters = list(parameters)
        counts = Counter(p for found in reached.values() for p in found)
        by_task = {task: [p for p in parameters if p in found] for task, found in reached.items()}
        return cls(by_task, [p for p in parameters if counts[p] > 1], outside, frozenset(tables))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.parameters)

    def nothing(self, parameter: nn.Parameter) -> Tensor:
        """A gradient of zero, for a rank that has none of a parameter which another rank reaches."""
        return no_rows(parameter) if parameter in self.tables else torch.zeros_like(parameter)

    def average(
        self, total: dict[Tensor, Tensor], parameters: Iterable[nn.Parameter], beside: Iterable[Tensor] = ()
    ) -> None:
        """Replace gradients, of which a rank may lack some, by their means over the ranks; `parameters` fix the order.

        The tensors `beside` become means in place, in the same messages.
        """
        if world_size() == 1:
            return
        reached = {p for found in self.parameters.values() for p in found}
        mine: dict[Tensor, Tensor] = {
            p: total[p] if p in total else self.nothing(p) for p in parameters if p in reached
        }
        total.update(average_gradients(mine, beside))

    def shared_layers(self, layer_of: Mapping[Tensor, int]) -> list[int]:
        """Those of some layers that two tasks or more reach, by any of their parameters, in order of their numbers."""
        reached = ({layer_of[p] for p in found if p in layer_of} for found in self.parameters.values())
        tasks_of = Counter(layer for layers in reached for layer in layers)
        return sorted(layer for layer, tasks in tasks_of.items() if tasks > 1)


class LossReach(NamedTuple):
    """What one loss depends on: all leaves, those of which it only looks rows up, and the opaque nodes it has met."""

    leaves: Sequence[Tensor]
    tables: set[Tensor]
    opaque: set[Edge]

    @classmethod
    def of(cls, loss: Tensor) -> LossReach:
        """Read it off the loss's graph."""
        known = held(loss)
        if known is not None:
            return cls(list(known.leaves), known.tables, set())
        nodes, opaque = graph_behind([loss])
        _refuse_reentrant_checkpoints(nodes)
        return cls(leaves_among([loss], nodes), lookup_tables(nodes), opaque)

    def refuse_hidden(self) -> None:
        """Refuse a loss that depends on parameters in a way that autograd hides, where no other loss is there to
        compare it with.

        Raises:
            UsageError: it uses one of several outputs of a part that torch cannot look into.
        """
        for node, output in self.opaque:
            if node is not None and edges_behind(node, output) is None:
                raise UsageError(_hidden_reach(node))


def find_reach(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> Reach:
    """What the losses of one step depend on, on any of the ranks; a loss that depends on nothing is refused.

    So is one that depends on some of the parameters in a way that autograd hides, by a scripted part say.
    """
    parameters = list(parameters)
    trainable = {p: None for p in parameters if p.requires_grad}  # ordered, and quick to look up
    reached: dict[str, set[nn.Parameter]] = {}
    outside: dict[str, list[Tensor]] = {}
    met: list[set[Edge]] = []
    looked_up: set[nn.Parameter] = set()
    whole: set[nn.Parameter] = set()  # what some task does more with than to look rows up
    for task, loss in losses.items():
        of_loss = LossReach.of(loss)
        met.append(of_loss.opaque)
        reached[task] = {leaf for leaf in of_loss.leaves if isinstance(leaf, nn.Parameter) and leaf in trainable}
        outside[task] = [leaf for leaf in of_loss.leaves if leaf not in trainable]
        looked_up |= reached[task] & of_loss.tables
        whole |= reached[task] - of_loss.tables
        if not reached[task]:
            raise GradientError(no_gradient(task))
    parting = _parting(met)
    for node, output in set().union(*met):
        if node is not None and node in parting and edges_behind(node, output) is None:
            raise UsageError(_hidden_reach(node))
    return agreed(Reach.of_tasks(reached, trainable, outside, looked_up - whole), parameters)


def agreed(reach: Reach, parameters: Sequence[nn.Parameter]) -> Reach:
    """What each task reaches on any of the ranks; a rank may lack a task's targets."""
    if world_size() == 1:
        return reach
    number_of = {p: number for number, p in enumerate(parameters)}
    mine = {task: [number_of[p] for p in found] for task, found in reach.parameters.items()}
    whole = {number_of[p] for found in reach.parameters.values() for p in found if p not in reach.tables}
    everyone = gather((len(parameters), mine, whole))
    if len({count for count, _, _ in everyone}) > 1:
        raise UsageError(
            f"The ranks' models have {[count for count, _, _ in everyone]} parameters. Build the same model on each."
        )
    reached: dict[str, set[nn.Parameter]] = {}
    for _, theirs, _ in everyone:
        for task, numbers in theirs.items():
            reached.setdefault(task, set()).update(parameters[number] for number in numbers)
    anywhere = {number_of[p] for found in reached.values() for p in found}
    tables = anywhere.difference(*(whole for _, _, whole in everyone))
    return Reach.of_tasks(reached, parameters, reach.outside, [parameters[number] for number in tables])


def no_gradient(task: str) -> str:
    """The message for a task whose loss has no gradient."""
    return (
        f"The loss of task {task!r} depends on no trainable parameter of the model, so it has no gradient. Check that "
        "it uses the model's output for this task, without detach() or no_grad(), and that not all of its layers are "
        "frozen."
    )


def _hidden_reach(node: Node) -> str:
    """The message for tasks that part inside a node that autograd cannot look into."""
    return (
        f"A part of the model was {how_hidden(node)}, which hides which of its parameters each task's loss depends on. "
        "Do this to the shared body and to each task's head separately, or train the plain model."
    )


def average_losses(losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """`{task: mean loss}`, detached, over the ranks that have one, so that a weighting weighs alike on all of them."""
    if world_size() == 1:
        return {task: loss.detach() for task, loss in losses.items()}
    # One precision on all ranks, whether they have losses or not: their weights must not differ by a rounding.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums, counts = torch.zeros(2, len(tasks), dtype=dtype, device=device)
    for number, task in enumerate(tasks):
        if task in losses:
            sums[number] = losses[task].detach()
            counts[number] = 1
    average_([sums, counts])
    return dict(zip(tasks, sums / counts, strict=True))


def compiled_as_one(losses: Mapping[str, Tensor]) -> bool:
    """Whether what two tasks do not share, their heads say, is computed by one compiled part of the model."""
    return any(map(is_compiled, _parting([LossReach.of(loss).opaque for loss in losses.values()])))


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


def _refuse_reentrant_checkpoints(nodes: Iterable[Node]) -> None:
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise GradientError(
            "A part of the model runs under torch.utils.checkpoint with use_reentrant=True, which hides its parameters "
            "from the graph, so recon cannot find the tasks' gradients there. Pass use_reentrant=False."
        )
