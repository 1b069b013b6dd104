"""The autograd graph behind some values, read without computing anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from recon.support.network.opaque_nodes import Edge, edges_behind, is_compiled, is_opaque


def reached_leaves(values: Sequence[Tensor]) -> set[Tensor]:
    """The leaf tensors that `values` depend on."""
    return set(leaves_among(values, graph_behind(values)[0]))


def last_uses(values: Sequence[Tensor]) -> dict[Tensor, int]:
    """When the forward pass used each leaf behind `values` for the last time: a number that grows as it proceeds."""
    uses: dict[Tensor, int] = {}
    for node in graph_behind(values)[0]:
        for leaf in leaves_among([], [used for used, _ in node.next_functions if used is not None]):
            uses[leaf] = max(uses.get(leaf, -1), node._sequence_nr())
    return uses


def used_at_once(values: Sequence[Tensor]) -> set[Tensor]:
    """The leaves behind `values` that a compiled part of the model uses, in an order that autograd does not know."""
    compiled = [node for node in graph_behind(values)[0] if is_compiled(node)]
    return set(leaves_among([], [used for node in compiled for used, _ in node.next_functions if used is not None]))


def leaves_before(values: Sequence[Tensor], stops: Collection[Node]) -> tuple[list[Tensor], set[Node]]:
    """The leaf tensors that `values` depend on other than through `stops`, and the stops that are reached."""
    nodes, _ = graph_behind(values, stops)
    return leaves_among(values, nodes), {node for node in nodes if node in stops}


def graph_behind(values: Sequence[Tensor], stops: Collection[Node] = ()) -> tuple[dict[Node, None], set[Edge]]:
    """The nodes that `values` depend on, in the order found, and which outputs of opaque ones.

    The search ends at the `stops`.
    """
    seen: dict[Node, None] = {}
    met: set[Edge] = set()
    stack: list[Edge] = [(v.grad_fn, v.output_nr) for v in values]
    while stack:
        node, output = edge = stack.pop()
        if node is None:
            continue
        if is_opaque(node):  # each of its outputs depends on other inputs
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


def leaves_among(values: Sequence[Tensor], nodes: Iterable[Node]) -> list[Tensor]:
    """Those of `values` that are leaves themselves, and the leaves at these nodes."""
    alone = [v for v in values if v.grad_fn is None and v.requires_grad]
    return alone + [node.variable for node in nodes if hasattr(node, "variable")]
