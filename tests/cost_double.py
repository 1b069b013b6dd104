"""A cost model of a graph that is written down, not traced: what runs per group is found by a walk over all of it."""

from __future__ import annotations

import networkx as nx

from recon.branching.partition import Partition, refine
from recon.plans.costing.cost_model import PlanCosts

TASKS = ("a", "b", "c")


class DrawnCosts:
    """The interface of `CostModel`, for operations (name, layer or None, parameters, macs, inputs) in their order."""

    traced = True
    unsupported = ()

    def __init__(self, operations, tasks=TASKS):
        self.tasks = tuple(tasks)
        self.graph = nx.DiGraph()
        self.sizes = {}
        for name, layer, parameters, macs, inputs in operations:
            served = (name,) if name in self.tasks else self.tasks  # a task's head has its name
            self.graph.add_node(name, layer=layer, macs=macs, tasks=served)
            self.graph.add_edges_from((source, name) for source in inputs)
            if layer is not None:
                self.sizes.setdefault(layer, parameters)
        self.layers = tuple(self.sizes)

    def of(self, layers):
        (parameters, macs), (plain, plain_macs) = self._count(layers), self._count({})
        return PlanCosts(parameters, sum(macs), 0, {}, parameters / plain, sum(macs) / sum(plain_macs))

    def operation_macs(self, layers):
        return self._count(layers)[1]

    def _count(self, layers):
        macs, fan = [], {}
        for node, data in self.graph.nodes(data=True):
            around = [fan[source].restrict(data["tasks"]) for source in self.graph.predecessors(node)]
            own = [layers[data["layer"]].restrict(data["tasks"])] if data["layer"] in layers else []
            shared = Partition(data["tasks"], (0,) * len(data["tasks"]))
            fan[node] = refine(shared, *around, *own)
            macs.append(data["macs"] * len(fan[node].groups))
        copies = {name: len(layers[name].groups) if name in layers else 1 for name in self.sizes}
        return sum(size * copies[name] for name, size in self.sizes.items()), macs


def chain(sizes, tasks=TASKS):
    """A chain of layers (parameters, macs), each followed by an activation, and a head for each task."""
    operations, last = [("x", None, 0, 0, [])], "x"
    for number, (parameters, macs) in enumerate(sizes):
        operations.append((f"op{number}", f"l{number}", parameters, macs, [last]))
        operations.append((f"relu{number}", None, 0, 0, [f"op{number}"]))
        last = f"relu{number}"
    heads = [(task, f"head.{task}", 5, 5, [last]) for task in tasks]
    return DrawnCosts(operations + heads, tasks)


def random_dag(rng, layers=8, tasks=TASKS):
    """Operations with one or two earlier inputs each, some of them reusing a layer."""
    operations = [("x", None, 0, 0, [])]
    for number in range(layers + 3):
        layer = f"l{number}" if number < layers else f"l{rng.integers(layers)}"
        count = min(len(operations), 1 + int(rng.random() < 0.4))
        near = [name for name, *_ in operations[-4:]]
        inputs = rng.choice(near, size=min(count, len(near)), replace=False).tolist()
        operations.append((f"op{number}", layer, int(rng.integers(1, 100)), int(rng.integers(0, 100)), inputs))
    ends = [name for name, *_ in operations if not any(name in inputs for *_, inputs in operations)]
    operations.append(("sum", None, 0, 0, ends))
    return DrawnCosts(operations + [(task, f"head.{task}", 5, 5, ["sum"]) for task in tasks], tasks)
