"""The dataflow of one forward pass: which operation reads what, within which module, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from networkx import DiGraph


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    path: str  # the module's (first)
    around: int  # the number of the call that it is made within; that of the model itself is within itself
    inputs: tuple[int, ...]  # the values among its arguments


@dataclass(frozen=True)
class Operation:
    """One torch function that made or wrote a value."""

    name: str
    value: int  # its number
    within: int  # the number of the innermost module call that it is run in
    inputs: tuple[int, ...]  # the values that it depends on
    macs: int  # multiply-adds
    bytes: int  # of the tensors that it makes
    written: tuple[tuple[int, int], ...]  # values that it writes into in place, and the bytes of their tensors


@dataclass(frozen=True)
class Dataflow:
    """What a forward pass does. A value is a number: first the parameters, then the buffers, then the operations."""

    parameters: tuple[nn.Parameter, ...]  # the first values
    owners: tuple[str, ...]  # the path of the module that holds each buffer, the values that follow
    steps: tuple[Call | Operation, ...]  # in the order in which they began
    outputs: Mapping[str, tuple[int, ...]]  # `{task: values in its output}`
    writes: tuple[tuple[str, int], ...]  # the modules whose buffers are written or assigned anew, with the value
    served: Mapping[Tensor, frozenset[str]]  # the tasks whose outputs each parameter gets gradient from
    unsupported: tuple[str, ...]  # kernels that ran outside of any torch function, so not among the steps

    @cached_property
    def calls(self) -> list[Call]:
        """The module calls, by number."""
        return [step for step in self.steps if isinstance(step, Call)]

    @cached_property
    def operations(self) -> list[Operation]:
        """The operations, in order."""
        return [step for step in self.steps if isinstance(step, Operation)]

    def tasks_served(self) -> dict[int, tuple[str, ...]]:
        """The tasks whose outputs depend on each operation's value."""
        serves: dict[int, set[str]] = {operation.value: set() for operation in self.operations}
        for task, outputs in self.outputs.items():
            for value in outputs:
                serves.get(value, set()).add(task)
        for operation in reversed(self.operations):
            for value in operation.inputs:
                serves.get(value, set()).update(serves[operation.value])
        return {value: tuple(task for task in self.outputs if task in found) for value, found in serves.items()}

    def to_graph(self, layer_names: Mapping[Tensor, str]) -> DiGraph:
        """A node per operation, numbered in order; an edge to each that uses its value.

        `layer_names` is `{parameter: name of its layer}`.
        """
        from networkx import DiGraph  # late: it is slow to import, and few need the graph

        graph = DiGraph()
        first, serves = len(self.parameters) + len(self.owners), self.tasks_served()
        for operation in self.operations:
            read = [self.parameters[value] for value in operation.inputs if value < len(self.parameters)]
            graph.add_node(
                operation.value - first,
                name=operation.name,
                module=self.calls[operation.within].path,
                layer=next((layer_names[p] for p in read if p in layer_names), None),
                macs=operation.macs,
                activation_bytes=operation.bytes,
                tasks=serves[operation.value],
            )
            graph.add_edges_from((v - first, operation.value - first) for v in operation.inputs if v >= first)
        return graph
