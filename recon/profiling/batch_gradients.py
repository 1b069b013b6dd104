"""The task gradients of one whole batch, kept for as long as it takes to compare them with those of another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from recon.errors import GradientError
from recon.methods.gradients.cross_gramians import Products, cross_gramians
from recon.methods.gradients.held import HeldGradients
from recon.methods.gradients.jacobian import TaskJacobian, Workspace, task_jacobian
from recon.methods.gradients.observer import StepObserver
from recon.methods.gradients.passes import Receive, differentiate
from recon.methods.gradients.reach import LossReach, Reach, agreed, find_reach, no_gradient
from recon.profiling.sketches.sketch import GradientSketch, TaskSketches, sketch_products
from recon.support.network.layers import Layer
from recon.support.processes import average_


class Gradients(Protocol):
    """One batch's task gradients, whole or sketched."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the rows."""

    def with_second(self, second: Gradients) -> tuple[list[int], Products]:
        """The L shared layers that can be compared, and the products of both batches there."""

    def unchanged(self) -> bool:
        """Whether nobody has written into them since."""


@dataclass
class WholeGradients:
    """The gradients themselves."""

    jacobian: TaskJacobian
    layers: list[int]  # the shared ones
    layer_of: Mapping[Tensor, int]

    @classmethod
    def of_step(cls, jacobian: TaskJacobian, layers: list[int], layer_of: Mapping[Tensor, int]) -> WholeGradients:
        """Those in the shared layers alone: the others need not be kept."""
        shared = set(layers)
        own = {
            task: {leaf: gradient for leaf, gradient in gradients.items() if layer_of.get(leaf) in shared}
            for task, gradients in jacobian.own.items()
        }
        return cls(replace(jacobian, own=own), layers, layer_of)

    def __post_init__(self) -> None:
        self._versions = [tensor._version for tensor in self._tensors()]

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Gradients`."""
        return self.jacobian.tasks

    def with_second(self, second: Gradients) -> tuple[list[int], Products]:
        """See `Gradients`."""
        assert isinstance(second, WholeGradients)
        return self.layers, cross_gramians(self.jacobian, second.jacobian, self.layers, self.layer_of)

    def unchanged(self) -> bool:
        """See `Gradients`."""
        return self._versions == [tensor._version for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [self.jacobian.matrix, *(g for own in self.jacobian.own.values() for g in own.values())]


@dataclass
class SketchedGradients:
    """Sketches (T, L, m) of the gradients in L layers."""

    tasks: tuple[str, ...]
    layers: list[int]
    sketches: Tensor

    def with_second(self, second: Gradients) -> tuple[list[int], Products]:
        """See `Gradients`."""
        assert isinstance(second, SketchedGradients)
        common = [layer for layer in self.layers if layer in second.layers]
        one, other = (part.sketches[:, [part.layers.index(layer) for layer in common]] for part in (self, second))
        return common, sketch_products(one, other)

    def unchanged(self) -> bool:
        """See `Gradients`."""
        return True


def gradients_of(
    losses: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    observer: StepObserver,
    layers: Sequence[Layer],
    layer_of: Mapping[Tensor, int],
) -> Gradients:
    """A batch's gradients, in the observer's kind of memory; `.grad` stays as it is, and the graph is freed.

    The losses are those of one forward, or of one after the other, each differentiated before the next is asked for;
    those of the same task add up.
    """
    with torch.autocast(observer.device.type, enabled=False):
        if not isinstance(losses, Mapping):
            if observer.memory == "sketch":
                return _sketched_in_turn(losses, observer, layers)
            losses = _held(losses, observer)
        elif observer.memory == "sketch":
            return _sketched(losses, observer, layers, layer_of)
        jacobian = task_jacobian(losses, observer.parameters, Workspace(), observer.buffers)
        return WholeGradients(jacobian, [], layer_of)


def _sketched(
    losses: Mapping[str, Tensor], observer: StepObserver, layers: Sequence[Layer], layer_of: Mapping[Tensor, int]
) -> Gradients:
    reach = find_reach(losses, observer.parameters)
    # Every layer that a task reaches: which of them the step shares may not be known yet.
    reached = sorted({layer_of[p] for found in reach.parameters.values() for p in found if p in layer_of})
    sketch = GradientSketch([list(layers[i].parameters.values()) for i in reached])
    sketches = sketch.zeros(len(reach.tasks), observer.device)

    def receive(number: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf in sketch:
                sketch.fold(leaf, gradient, sketches[number])

    differentiate(losses, reach, observer.buffers, receive)
    average_([sketches])
    return SketchedGradients(reach.tasks, reached, sketches)


def _held(passes: Iterable[Mapping[str, Tensor]], observer: StepObserver) -> dict[str, Tensor]:
    """Losses whose graphs are gone, since their gradients are there already."""
    values: dict[str, Tensor] = {}
    held: dict[str, HeldGradients] = {}
    for task, loss, retain_graph in _in_turn(passes):
        found = HeldGradients()

        def receive(_: int, leaves: list[Tensor], gradients: list[Tensor], found: HeldGradients = found) -> None:
            for leaf, gradient in zip(leaves, gradients, strict=True):
                found.keep(leaf, gradient, None)

        reached, found.tables = _differentiate(task, loss, observer, receive, retain_graph)
        found.leaves = dict.fromkeys(reached)
        if task in held:
            held[task].add(found)
        else:
            held[task], values[task] = found, loss.detach()
    return {task: found.as_loss(values[task]) for task, found in held.items()}


def _sketched_in_turn(
    passes: Iterable[Mapping[str, Tensor]], observer: StepObserver, layers: Sequence[Layer]
) -> Gradients:
    sketches = TaskSketches(GradientSketch([list(layer.parameters.values()) for layer in layers]), observer.device)
    reached: dict[str, set[nn.Parameter]] = {}
    for task, loss, retain_graph in _in_turn(passes):

        def receive(_: int, leaves: list[Tensor], gradients: list[Tensor], task: str = task) -> None:
            for leaf, gradient in zip(leaves, gradients, strict=True):
                sketches.fold(task, leaf, gradient)

        mine, _ = _differentiate(task, loss, observer, receive, retain_graph)
        reached.setdefault(task, set()).update(mine)
    reach = agreed(Reach.of_tasks(reached, observer.parameters, {}), observer.parameters)
    of_all = sketches.of(reach.tasks)
    average_([of_all])
    return SketchedGradients(reach.tasks, list(range(len(layers))), of_all)


def _in_turn(passes: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor, bool]]:
    """Each task and its loss, and whether another one of the same forward follows."""
    for losses in passes:
        for number, (task, loss) in enumerate(losses.items(), start=1):
            yield task, loss, number < len(losses)


def _differentiate(
    task: str, loss: Tensor, observer: StepObserver, receive: Receive, retain_graph: bool
) -> tuple[list[nn.Parameter], set[Tensor]]:
    """One loss: the parameters that it reaches, and those of which it only looks rows up."""
    of_loss = LossReach.of(loss)
    of_loss.refuse_hidden()
    leaves = set(of_loss.leaves)
    mine = [p for p in observer.parameters if p in leaves and p.requires_grad]
    if not mine:
        raise GradientError(no_gradient(task))
    differentiate({task: loss}, Reach({task: mine}, []), observer.buffers, receive, retain_graph)
    return mine, set(of_loss.tables)
