"""Look inside autograd nodes that hold a whole part of a model: compiled code, and wrappers around outputs.

For autograd, each output of a node depends on all its inputs. If one node holds the trunk and the heads of all tasks,
every task seems to reach every head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd.graph import Node

Edge = tuple[Node | None, int]
"""A node, and which of its outputs."""

_COMPILED = "CompiledFunctionBackward"

# Nodes of DistributedDataParallel, of full backward hooks, and of DataParallel, which copies to each device.
_HANDED_ON = {"_DDPSinkBackward", "BackwardHookFunctionBackward", "BroadcastBackward"}
_CLOSED = {
    "DifferentiableGraphBackward": "scripted or traced (torch.jit)",
    "GraphedBackward": "captured in CUDA graphs",
}

_KINDS = {_COMPILED, *_HANDED_ON, *_CLOSED}

_Opened = tuple[int, dict[int, list[int]]]
"""How many inputs a compiled node has, and `{output: the numbers of those it depends on}`."""

_opened: WeakKeyDictionary[type, _Opened | None] = WeakKeyDictionary()


def is_opaque(node: Node) -> bool:
    """Whether an output of this node may depend on some of its inputs only."""
    return _kind(node) in _KINDS


def is_compiled(node: Node) -> bool:
    """Whether this node is a part of the model that torch.compile has compiled."""
    return _kind(node) == _COMPILED


def edges_behind(node: Node, output: int) -> Sequence[Edge] | None:
    """The next edges that this output of an opaque node depends on; None if torch does not show it."""
    kind, edges = _kind(node), node.next_functions
    if kind in _HANDED_ON:
        return [edges[output % len(edges)]]
    opened = _open(node) if kind == _COMPILED else None
    if opened is not None and opened[0] == len(edges) and output in opened[1]:
        return [edges[number] for number in opened[1][output]]
    if len(getattr(node, "_input_metadata", ())) == 1:  # there is no other output
        return edges
    return None


def how_hidden(node: Node) -> str:
    """What was done to the part of the model inside an opaque node, for a message."""
    return _CLOSED.get(_kind(node), "compiled as a whole")


def _kind(node: Node) -> str:
    kind = type(node).__name__
    if kind == "CppFunction":  # nodes without a class in Python, whose name is that of a place in C++
        return node.name().rpartition("::")[2]
    return kind if kind not in _KINDS or _is_of_torch(node) else ""


def _is_of_torch(node: Node) -> bool:
    """Whether the node is of torch's own class, not of a user's class of the same name."""
    return getattr(node, "_forward_cls", object).__module__.startswith("torch.")


def _open(node: Node) -> _Opened | None:
    forward = node._forward_cls  # type: ignore[attr-defined]
    if forward not in _opened:
        try:
            _opened[forward] = _trace(forward)
        except Exception:  # another version of torch may be built differently
            _opened[forward] = None
    return _opened[forward]


def _trace(forward: Any) -> _Opened:
    """Follow the graph of the backward that AOTAutograd has traced; torch has no public access to it."""
    kept = forward._lazy_backward_info
    graph = (kept.bw_module if hasattr(kept, "bw_module") else kept.bw_module_fn()).graph
    outputs = _differentiable_outputs(forward.metadata)
    tangents = [node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)]
    sources: dict[Any, set[int]] = {tangent: {number} for tangent, number in zip(tangents, outputs, strict=True)}
    for node in graph.nodes:  # in the order of computation
        sources.setdefault(node, set()).update(*(sources[used] for used in node.all_input_nodes))
    (result,) = (node for node in graph.nodes if node.op == "output")
    # Only numbers among the inputs have no edge: they neither require a gradient nor are leaves.
    inputs = [
        gradient
        for gradient, info in zip(result.args[0], forward.metadata.input_info, strict=True)
        if info.requires_grad or info.is_leaf
    ]
    # A gradient that is always zero (that of a sign, say) counts for every output.
    behind = {
        output: [i for i, g in enumerate(inputs) if g is not None and (output in sources[g] or not sources[g])]
        for output in outputs
    }
    return len(inputs), behind


def _differentiable_outputs(metadata: Any) -> list[int]:
    """The outputs of the node for which its backward graph takes a gradient, in the order in which it takes them."""
    from torch._functorch._aot_autograd.schemas import OutputType

    own = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)
    changed = [metadata.input_info[number] for number in metadata.mutated_inp_runtime_indices]
    outputs = [number for number, info in enumerate(changed) if info.mutates_data and info.requires_grad]
    for number, info in enumerate(metadata.output_info, start=len(changed)):
        wants = getattr(info, "requires_grad_for_backward", info.requires_grad)
        if info.output_type in own and issubclass(info.raw_type, torch.Tensor) and wants:
            outputs.append(number)
    start = len(changed) + metadata.num_outputs
    return [*outputs, *range(start, start + metadata.num_intermediate_bases)]
