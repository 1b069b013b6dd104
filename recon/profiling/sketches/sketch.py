"""GradientSketch: task gradients folded, as they are made, into a few numbers a layer that keep their cosines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from recon.methods.gradients.cross_gramians import Products
from recon.methods.gradients.jacobian import width
from recon.methods.gradients.sparse import row_numbers
from recon.support.network.tensors import as_real

SIZE = 2039
"""Numbers a layer. A prime: the rows of a weight, whose sizes are not, do not line up with it."""

_ROWS = 512  # rows of random signs; longer layers use them again
_SEED = 20230501


class GradientSketch:
    """Count sketches of the gradients of some layers (Charikar, Chen and Farach-Colton, ICALP 2002).

    Entry i of a layer's gradient, its parameters one after the other, is added with a fixed random sign to number
    `i mod size`. The map is linear, so the sketch of a sum (over the pieces of a layer, or over processes) is the sum
    of the sketches; and it keeps inner products: the error of a cosine has a standard deviation of at most about
    1 / sqrt(size), and is nothing but rounding in a layer of at most `size` numbers.

    L layers are given by their parameters; m is the size.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], size: int = SIZE) -> None:
        self.size = size
        self._layers = len(layers)
        self._place: dict[Tensor, tuple[int, int]] = {}  # layer, and where in its gradient the parameter begins
        for number, parameters in enumerate(layers):
            start = 0
            for parameter in parameters:
                self._place[parameter] = number, start
                start += width(parameter)
        draw = torch.Generator().manual_seed(_SEED)
        signs = torch.randint(0, 2, (_ROWS, size), generator=draw, dtype=torch.int8).mul_(2).sub_(1).float()
        self._in_a_row = torch.cat([signs.view(-1), signs[0]])  # where they begin again, too
        self._signs = self._in_a_row[:-size].view(_ROWS, size)
        self._products = torch.empty(0)

    def __contains__(self, leaf: Tensor) -> bool:
        """Whether this is a parameter of one of the layers."""
        return leaf in self._place

    def zeros(self, tasks: int, device: torch.device) -> Tensor:
        """(tasks, L, m): sketches of nothing, to be filled by `fold`."""
        self._in_a_row = self._in_a_row.to(device)
        self._signs = self._in_a_row[: -self.size].view(_ROWS, self.size)
        return torch.zeros(tasks, self._layers, self.size, device=device)

    def fold(self, parameter: Tensor, gradient: Tensor, sketches: Tensor) -> None:
        """Add one parameter's gradient to one task's sketches, (L, m)."""
        layer, start = self._place[parameter]
        sketch = sketches[layer]
        if gradient.is_sparse:
            self._fold_rows(start, gradient, sketch)
            return
        rest = as_real(gradient).reshape(-1)
        while len(rest):
            row, column = divmod(start % self._signs.numel(), self.size)
            if column or len(rest) < self.size:  # up to the end of a row
                count = min(self.size - column, len(rest))
                sketch[column : column + count] += rest[:count] * self._signs[row, column : column + count]
            else:
                rows = min(_ROWS - row, len(rest) // self.size)
                count = rows * self.size
                sketch += self._signed_sum(rest[:count].view(rows, self.size), self._signs[row : row + rows])
            start, rest = start + count, rest[count:]

    def _fold_rows(self, start: int, gradient: Tensor, sketch: Tensor) -> None:
        """Add a sparse gradient, whose parameter begins at `start`: its numbers go where they would with the zeros."""
        values = as_real(gradient._values()).reshape(gradient._nnz(), -1)
        rows = start + row_numbers(gradient._indices(), gradient.shape) * values.shape[1]
        for piece in values.split(self.size, dim=1):
            width = piece.shape[1]
            signs = self._in_a_row.unfold(0, width, 1).index_select(0, rows % self._signs.numel())
            places = (rows % self.size)[:, None] + torch.arange(width, device=rows.device)
            folded = sketch.new_zeros(self.size + width)  # a row may begin before the end, and go on behind it
            folded.index_add_(0, places.flatten(), (piece * signs).flatten().to(sketch.dtype))
            sketch += folded[: self.size]
            sketch[:width] += folded[self.size :]
            rows = rows + width

    def _signed_sum(self, values: Tensor, signs: Tensor) -> Tensor:
        if self._products.device != signs.device or not len(self._products):
            self._products = torch.empty_like(self._signs)
        return torch.mul(values, signs, out=self._products[: len(values)]).sum(dim=0)


@cache
def _random_signs(size: int) -> Tensor:
    draw = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 2, (_ROWS, size), generator=draw, dtype=torch.int8).mul_(2).sub_(1).float()


class TaskSketches:
    """The sketches of one step that goes task by task, of all layers: which of them are shared shows at its end."""

    def __init__(self, sketch: GradientSketch, device: torch.device) -> None:
        self._sketch, self._device = sketch, device
        self._of_task: dict[str, Tensor] = {}

    def fold(self, task: str, leaf: Tensor, gradient: Tensor) -> None:
        """Add a task's gradient at one leaf; a leaf of none of the layers is left out."""
        if task not in self._of_task:
            self._of_task[task] = self._sketch.zeros(1, self._device)[0]
        if leaf in self._sketch:
            self._sketch.fold(leaf, gradient, self._of_task[task])

    def of(self, tasks: Sequence[str]) -> Tensor:
        """(T, L, m): the sketches of these tasks, zero for one without gradients."""
        sketches = self._sketch.zeros(len(tasks), self._device)
        for sketch, task in zip(sketches, tasks, strict=True):
            if task in self._of_task:
                sketch.copy_(self._of_task[task])
        return sketches


def sketch_products(sketches: Tensor, others: Tensor) -> Products:
    """What the cosines between the gradients of two batches need, from sketches (T, L, m) and (T', L, m)."""
    wide = torch.float32 if sketches.device.type == "mps" else torch.float64
    first, second = (of.to(wide).transpose(0, 1) for of in (sketches, others))
    with torch.autocast(sketches.device.type, enabled=False):
        return Products(first @ second.mT, first.square().sum(dim=2), second.square().sum(dim=2))


def sketch_gramians(sketches: Tensor) -> Tensor:
    """The Gramians of the L layers from sketches (T, L, m): (L, T, T), in float64 where there is one."""
    wide = torch.float32 if sketches.device.type == "mps" else torch.float64
    by_layer = sketches.to(wide).transpose(0, 1)
    with torch.autocast(sketches.device.type, enabled=False):
        return by_layer @ by_layer.mT
