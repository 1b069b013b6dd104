"""The costs of any plan for one model, without converting it: a plan optimiser asks for them thousands of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from recon.branching import BranchPlan, Partition, convert, plan_of
from recon.branching.conversion import refuse_model
from recon.errors import PlanError, ProblemError, ReconError
from recon.plans.costing.counting import count_activation_bytes, count_macs, count_parameters
from recon.plans.costing.fan_out import SHARED, FanOut
from recon.plans.costing.trace import trace
from recon.support.network.layers import canonical_name, find_layers

if TYPE_CHECKING:
    from networkx import DiGraph


@dataclass(frozen=True)
class PlanCosts:
    """What a model costs under a plan.

    Args:
        parameters: how many scalars the parameters hold, tied ones once.
        macs: multiply-adds of convolutions and matrix products in a forward in evaluation mode on the example batch,
            as `torch.utils.flop_counter` counts them.
        activation_bytes: of all tensors that the operations of a forward in training mode make on the example batch,
            each once: a view or a write in place makes none, but an operation that needs several kernels makes what
            these pass on too. Attention and recurrent layers are computed step by step; fused kernels make less.
        runs: `{module path: partition}`, the modules that run once per group: what is computed directly in them,
            not in their submodules, has fanned out into these groups. Tasks that a module does not serve are in none.
    """

    parameters: int
    macs: int
    activation_bytes: int
    runs: Mapping[str, Partition]
    parameters_ratio: float
    macs_ratio: float


class CostModel:
    """The costs of any plan for one model, without running it.

    One forward in training mode and one in evaluation mode are traced, operation by operation; how values fan out
    under a plan then follows from which operation reads what. What can't be traced is measured instead, by a dry run
    of the converted model for every plan: this is slow, and `traced` says so.

    A plan that `recon.convert` refuses, because a statement of the forward cannot work on fans, costs here what it
    would if it could.

    Args:
        model: the unbranched model, which is left as it is.
        tasks: the names of its outputs.
        example_inputs: a small batch of inputs (two samples or more), as for `recon.convert`.

    Attributes:
        layers: the names of all layers, in model order.
        unsupported: the kernels that C++ code called (a scripted module's), or the error that stopped the trace.

    Raises:
        PlanError: the model is branched already.
        UsageError: the model is wrapped (DDP, compiled, scripted), or its forward fails on the example inputs.
        ProblemError: its output lacks a task.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], example_inputs: Any) -> None:
        refuse_model(model)
        self.tasks = tuple(tasks)
        self._model, self._inputs = model, example_inputs
        self._layers = find_layers(model)
        self.layers = tuple(layer.name for layer in self._layers)
        self.unsupported = self._trace()
        self._base = self._costs({}, None)

    def _trace(self) -> tuple[str, ...]:
        try:
            training, evaluation = (
                trace(self._model, self.tasks, self._inputs, training=training) for training in (True, False)
            )
        except ProblemError:
            raise
        except Exception as error:  # if the forward itself fails, the dry run says so
            cause = error.__cause__ if isinstance(error, ReconError) and error.__cause__ else error
            return (f"{type(cause).__name__}: {cause}",)
        if training.unsupported or evaluation.unsupported:
            return tuple(dict.fromkeys((*training.unsupported, *evaluation.unsupported)))
        self._flow = training
        self._fan_out = FanOut(self._model, self.tasks, training, evaluation)
        calls = training.calls
        self._made = [(o.value, o.bytes, o.written) for o in training.operations if o.bytes or o.written]
        self._macs = [(o.value, o.macs) for o in evaluation.operations if o.macs]
        self._places = [(o.value, calls[o.within].path) for o in training.operations]
        return ()

    @property
    def traced(self) -> bool:
        """Whether the forward could be traced; if not, `of` measures a converted model."""
        return not self.unsupported

    def of(self, layers: Mapping[str, Partition]) -> PlanCosts:
        """The costs with these layers branched.

        Args:
            layers: `{layer name: partition of the tasks}`; empty for the unbranched model.

        Raises:
            UnknownNameError: the model has no such layer.
            PlanError: a partition is not one of the model's tasks.
            FanError: the forward could not be traced, and converting the model for this plan fails.
        """
        known = set(self.layers)
        layers = {n if n in known else canonical_name(self._layers, n): partition for n, partition in layers.items()}
        for name, partition in layers.items():
            if partition.tasks != self.tasks:
                raise PlanError(
                    f"Layer {name!r} is split over tasks {list(partition.tasks)}, but the cost model is for "
                    f"{list(self.tasks)}."
                )
        return self._costs(layers, self._base)

    def operation_macs(self, layers: Mapping[str, Partition]) -> list[int]:
        """The multiply-adds of each operation that has any, with these layers branched; they add up to `of`'s.

        Where the forward could not be traced, single operations are unknown, and the list is empty.
        """
        if not self.traced:
            return []
        _, evaluation = self._fan_out.fans(self._fan_out.parameters(layers))
        return [count * self._fan_out.partitions.sizes[evaluation[value]] for value, count in self._macs]

    def _costs(self, layers: Mapping[str, Partition], base: PlanCosts | None) -> PlanCosts:
        parameters, macs, size, runs = self._count(layers) if self.traced else self._measure(layers)
        ratios = (_ratio(parameters, base.parameters), _ratio(macs, base.macs)) if base is not None else (1.0, 1.0)
        return PlanCosts(parameters, macs, size, runs, *ratios)

    def _count(self, layers: Mapping[str, Partition]) -> tuple[int, int, int, dict[str, Partition]]:
        partitions = self._fan_out.partitions
        sizes, split = partitions.sizes, partitions.split
        own = self._fan_out.parameters(layers)
        training, evaluation = self._fan_out.fans(own)
        parameters = sum(p.numel() * sizes[number] for p, number in zip(self._flow.parameters, own, strict=True))
        macs = sum(count * sizes[evaluation[value]] for value, count in self._macs)
        made = 0
        for value, size, written in self._made:
            number = training[value]
            made += size * sizes[number]
            for old, held in written:  # what is shared by groups that no longer agree is copied first
                if training[old] != number:
                    made += held * split(training[old], number)
        runs: dict[str, int] = {}
        for value, path in self._places:
            number = training[value]
            if number != SHARED:
                known = runs.get(path, number)
                runs[path] = number if known == number else partitions.overlay(known, number)
        return parameters, macs, made, {p: partitions[number] for p, number in runs.items() if sizes[number] > 1}

    def _measure(self, layers: Mapping[str, Partition]) -> tuple[int, int, int, dict[str, Partition]]:
        layers = {name: partition for name, partition in layers.items() if len(partition.groups) > 1}
        model, runs = self._model, {}
        if layers:
            model = convert(model, BranchPlan(self.tasks, layers), self._inputs)
            runs = {**(plan_of(model).statistics or {}), **layers}
        activation_bytes = count_activation_bytes(model, self._inputs)  # first: it says so if the inputs do not fit
        return count_parameters(model.parameters()), count_macs(model, self._inputs), activation_bytes, runs

    @cached_property
    def graph(self) -> DiGraph:
        """The dataflow of a forward in training mode, a `networkx.DiGraph`; empty if it could not be traced.

        A node is an operation, numbered in the order of execution; an edge goes to each that uses its value. Node data:
        `name` of the torch function, `module` (path) that it is run in, `layer` whose parameters it reads (`None`: no
        layer's), `macs`, `activation_bytes`, and `tasks`, those whose outputs depend on it.
        """
        if not self.traced:
            from networkx import DiGraph  # late: as in `Dataflow.to_graph`

            return DiGraph()
        return self._flow.to_graph({p: layer.name for layer in self._layers for p in layer.parameters.values()})


def _ratio(value: int, base: int) -> float:
    return value / base if base else 1.0
