"""One trunk for all tasks: the plainest network for rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def mlp(in_features: int, widths: Sequence[int], dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths, each followed by a batch norm if `norm`, a ReLU, and dropout if it is not 0."""
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Linear(in_features, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers)


def make_towers(tasks: Mapping[str, int], in_features: int, widths: Sequence[int], dropout: float) -> nn.ModuleDict:
    """For each task `mlp`, and a linear layer for its outputs."""
    last = widths[-1] if widths else in_features
    return nn.ModuleDict(
        {task: mlp(in_features, widths, dropout).append(nn.Linear(last, outputs)) for task, outputs in tasks.items()}
    )


class SharedBottom(nn.Module):
    """A multilayer perceptron that all tasks share, and a tower on it for each (Caruana, Machine Learning 28, 1997).

    Args:
        tasks: `{task name: number of outputs}`.
        in_features: numbers in a row.
        bottom: widths of the shared hidden layers; at least one.
        towers: widths of each task's own hidden layers; a tower is a linear layer where there is none.
        dropout: the part of each hidden layer's activations that is dropped.
        input_dropout: the part of the inputs that is dropped.
        norm: whether each shared hidden layer has a batch norm.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        in_features: int,
        bottom: Sequence[int] = (128, 64),
        towers: Sequence[int] = (),
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.input_dropout = nn.Dropout(input_dropout)
        self.bottom = mlp(in_features, bottom, dropout, norm)
        self.towers = make_towers(tasks, bottom[-1], towers, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Rows `(N, in_features)` to `{task: (N, outputs)}`."""
        features = self.bottom(self.input_dropout(x))
        return {task: tower(features) for task, tower in self.towers.items()}
