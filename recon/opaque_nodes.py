"""What lies behind autograd nodes that stand for a whole part of a model: compiled code, and wrappers around outputs.

For autograd, each output of a node depends on all its inputs. Where one node holds the trunk and the heads of all
tasks, every task would so reach every head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd.graph import Node

from recon.errors import UsageError

Edge = tuple[Node | None, int]
"""A node, and which of its outputs."""

COMPILED = "CompiledFunctionBackward"

# Of DistributedDataParallel, of modules with full backward hooks, and of DataParallel, which copies for each device.
_HANDED_ON = {"_DDPSinkBackward", "BackwardHookFunctionBackward", "BroadcastBackward"}
_CLOSED = {
    "DifferentiableGraphBackward": "scripted or traced (torch.jit)",
    "GraphedBackward": "captured in CUDA graphs",
}

_Opened = tuple[int, dict[int, list[int]]]
"""How many inputs of a compiled node have a gradient, and `{output: the numbers of those it depends on}`."""

_opened: WeakKeyDictionary[type, _Opened] = WeakKeyDictionary()


def is_opaque(node: Node) -> bool:
    """Whether an output of this node may depend on some of its inputs only."""
    kind = _kind(node)
    return kind == COMPILED or kind in _HANDED_ON or kind in _CLOSED


def is_compiled(node: Node) -> bool:
    """Whether this node is a part of the model that torch.compile has made one."""
    return type(node).__name__ == COMPILED


def edges_behind(node: Node, output: int) -> Sequence[Edge]:
    """The next edges that this output of an opaque node depends on.

    Raises:
        UsageError: that cannot be told.
    """
    kind, edges = _kind(node), node.next_functions
    if kind in _HANDED_ON:
        return [edges[output % len(edges)]]
    if len(getattr(node, "_input_metadata", ())) == 1:  # there is no other output
        return edges
    if kind in _CLOSED:
        raise UsageError(
            f"A part of the model was {_CLOSED[kind]}, which hides which of its parameters each task's loss depends "
            "on. Train the plain model, and make the other of it afterwards."
        )
    forward = node._forward_cls  # type: ignore[attr-defined]
    if forward not in _opened:
        _opened[forward] = _open(forward)
    gradients, behind = _opened[forward]
    edges = tuple(edge for edge in edges if edge[0] is not None)
    if gradients != len(edges) or output not in behind:
        raise _unseen()
    return [edges[number] for number in behind[output]]


def _kind(node: Node) -> str:
    """The name of its class; of torch's own ones in C++ that have no class in Python, what it calls itself."""
    kind = type(node).__name__
    return node.name().rpartition("::")[2] if kind == "CppFunction" else kind


def _open(forward: Any) -> _Opened:
    try:
        return _trace(forward)
    except Exception as error:  # whatever another version of torch makes of its own parts
        raise _unseen() from error


def _trace(forward: Any) -> _Opened:
    """Follow the graph of the backward, which AOTAutograd has traced and keeps; there is no public way to it."""
    kept = forward._lazy_backward_info
    graph = (kept.bw_module if hasattr(kept, "bw_module") else kept.bw_module_fn()).graph
    outputs = _differentiable_outputs(forward.metadata)
    tangents = [node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)]
    sources: dict[Any, set[int]] = {tangent: {number} for tangent, number in zip(tangents, outputs, strict=True)}
    for node in graph.nodes:  # in the order of computation
        sources.setdefault(node, set()).update(*(sources[used] for used in node.all_input_nodes))
    (result,) = (node for node in graph.nodes if node.op == "output")
    gradients = [sources[gradient] for gradient in result.args[0] if gradient is not None]
    # A gradient that is zero whatever comes in, of a sign say, is one of every output.
    behind = {output: [i for i, found in enumerate(gradients) if output in found or not found] for output in outputs}
    return len(gradients), behind


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


def _unseen() -> UsageError:
    return UsageError(
        "A part of the model was compiled as a whole, and this version of torch does not show which of its parameters "
        "each task's loss depends on. Compile its parts apart (the shared body, each task's head), or train the plain "
        "model."
    )


@contextmanager
def several_passes() -> Iterator[None]:
    """Around a backward pass that keeps the graph: a compiled backward may have been made for a single one.

    Raises:
        UsageError: it was.
    """
    try:
        yield
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise UsageError(
            "Gradients by task need a backward pass for each task, but the model was compiled for a single one, in "
            "which its buffers are used up. Set torch._functorch.config.donated_buffer = False before the model runs "
            "for the first time (after torch.compiler.reset(), if it has run)."
        ) from error
