"""Tables with sparse gradients (`nn.Embedding(sparse=True)`): those in a model, and those in an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.autograd.graph import Node

from recon.support.network.graph import leaves_among

# Operations that may return a sparse gradient, and where their nodes keep whether they do.
_LOOKUPS = {
    "EmbeddingBackward0": "_saved_sparse",
    "EmbeddingBagBackward0": "_saved_sparse",
    "GatherBackward0": "_saved_sparse_grad",
}


def sparse_tables(model: nn.Module) -> list[Tensor]:
    """The tables of torch's own modules, each once, in model order; whatever else is done with them in a forward."""
    modules = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    return list(dict.fromkeys(module.weight for module in modules))


def lookup_tables(nodes: Iterable[Node]) -> set[Tensor]:
    """The leaves of which these nodes look rows up and nothing else, so that autograd gives them sparse gradients."""
    kinds = [(node, _LOOKUPS.get(type(node).__name__)) for node in nodes]
    lookups = {node for node, flag in kinds if flag is not None and getattr(node, flag)}
    if not lookups:
        return set()
    others = [used for node, _ in kinds if node not in lookups for used, _ in node.next_functions]
    looked_up = [node.next_functions[0][0] for node in lookups]
    tables, rest = (leaves_among([], [n for n in used if n is not None]) for used in (looked_up, others))
    return set(tables).difference(rest)
