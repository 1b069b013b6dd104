"""Mixtures of experts with a gate for each task: MMoE and PLE, for rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recon.models.shared_bottom import make_towers, mlp


class Experts(nn.ModuleList):
    """`count` multilayer perceptrons with hidden layers of these widths."""

    def __init__(self, count: int, in_features: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__(mlp(in_features, widths, dropout) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Inputs `(N, in_features)` to the output of each expert, `(N, widths[-1])`."""
        return [expert(x) for expert in self]


class Gate(nn.Module):
    """Mixes experts by weights that depend on its input.

    The weights are `softmax(W x)` (Ma et al., KDD 2018, section 4.2; Tang et al., RecSys 2020, section 4.1).
    """

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, experts, bias=False)

    def forward(self, x: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Inputs `(N, in_features)` and the experts' outputs, `(N, width)` each, to `(N, width)`."""
        weights = self.linear(x).softmax(dim=1)
        return torch.einsum("ne,new->nw", weights, torch.stack(list(experts), dim=1))


class MMoE(nn.Module):
    """Multi-gate mixture-of-experts (Ma et al., "Modeling Task Relationships in Multi-task Learning", KDD 2018).

    All tasks share the experts; each has a gate and a tower of its own. Task k's output is (section 4.2)

        y_k = h_k(f_k(x)),    f_k(x) = Σ_i g_k(x)_i f_i(x),    g_k(x) = softmax(W_k x).

    Args:
        tasks: `{task name: number of outputs}`.
        in_features: numbers in a row.
        experts: how many there are.
        expert: widths of each expert's hidden layers; at least one. The last is its output.
        towers: widths of each task's own hidden layers; a tower is a linear layer where there is none.
        dropout: the part of each hidden layer's activations that is dropped.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        in_features: int,
        experts: int = 8,
        expert: Sequence[int] = (64,),
        towers: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.experts = Experts(experts, in_features, expert, dropout)
        self.gates = nn.ModuleDict({task: Gate(in_features, experts) for task in tasks})
        self.towers = make_towers(tasks, expert[-1], towers, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Rows `(N, in_features)` to `{task: (N, outputs)}`."""
        outputs = self.experts(x)
        return {task: tower(self.gates[task](x, outputs)) for task, tower in self.towers.items()}


class PLE(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020, section 4.2).

    Each layer has experts that all tasks share and experts of each task. A task's gate mixes its own and the shared
    ones; its mixture is the input of the task's experts and gate in the next layer. The shared gate mixes all of them
    for the next layer's shared experts. With one layer, this is the paper's customized gate control (CGC, section 4.1).

    Args:
        tasks: `{task name: number of outputs}`.
        in_features: numbers in a row.
        layers: how many extraction layers there are.
        shared_experts: how many experts a layer shares among the tasks.
        task_experts: how many experts each task has of its own in a layer.
        expert: widths of each expert's hidden layers; at least one. The last is its output.
        towers: widths of each task's own hidden layers; a tower is a linear layer where there is none.
        dropout: the part of each hidden layer's activations that is dropped.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        in_features: int,
        layers: int = 2,
        shared_experts: int = 2,
        task_experts: int = 2,
        expert: Sequence[int] = (64,),
        towers: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_features] + [expert[-1]] * (layers - 1)
        self.layers = nn.ModuleList(
            Extraction(list(tasks), width, shared_experts, task_experts, expert, dropout, is_last=number == layers)
            for number, width in enumerate(widths, start=1)
        )
        self.towers = make_towers(tasks, expert[-1], towers, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Rows `(N, in_features)` to `{task: (N, outputs)}`."""
        shared, own = x, dict.fromkeys(self.towers, x)
        for layer in self.layers:
            shared, own = layer(shared, own)
        return {task: tower(own[task]) for task, tower in self.towers.items()}


class Extraction(nn.Module):
    """One layer of PLE; nothing needs the shared gate of the last."""

    def __init__(
        self,
        tasks: Sequence[str],
        in_features: int,
        shared_experts: int,
        task_experts: int,
        expert: Sequence[int],
        dropout: float,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.shared_experts = Experts(shared_experts, in_features, expert, dropout)
        self.task_experts = nn.ModuleDict({task: Experts(task_experts, in_features, expert, dropout) for task in tasks})
        self.gates = nn.ModuleDict({task: Gate(in_features, task_experts + shared_experts) for task in tasks})
        self.shared_gate = None if is_last else Gate(in_features, len(tasks) * task_experts + shared_experts)

    def forward(self, shared: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The shared and each task's mixture of the layer before, `(N, in_features)`, to this one's, `(N, width)`.

        The last layer returns the shared one as it is.
        """
        of_all = self.shared_experts(shared)
        of_task = {task: experts(own[task]) for task, experts in self.task_experts.items()}
        mixtures = {task: gate(own[task], of_task[task] + of_all) for task, gate in self.gates.items()}
        if self.shared_gate is not None:
            shared = self.shared_gate(shared, [output for outputs in of_task.values() for output in outputs] + of_all)
        return shared, mixtures
