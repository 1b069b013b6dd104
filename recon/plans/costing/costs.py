"""What a model costs: parameters, multiply-adds and activation memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from torch import nn

from recon.branching import BranchPlan, convert
from recon.errors import UsageError, type_name
from recon.plans.costing.cost_model import CostModel
from recon.plans.costing.counting import count_activation_bytes, count_macs, count_parameters


@dataclass(frozen=True)
class Costs:
    """The cost of one forward pass on the example inputs.

    Args:
        parameters: how many scalars the parameters hold, tied ones once.
        macs: forward multiply-adds of convolutions and matrix products, for the whole batch of example inputs.
        activation_bytes: of the tensors that a forward in training mode makes for this batch, as
            `PlanCosts` defines it; `None` where that forward fails (batch norm on a single sample).
        measured: whether they were counted while this model ran; if not, they follow from the dataflow of the
            unbranched one.
    """

    parameters: int
    macs: int
    activation_bytes: int | None = None
    measured: bool = field(default=True, compare=False)


def costs(model: nn.Module, plan: BranchPlan | None = None, example_inputs: Any = None) -> Costs:
    """The costs of `model` branched by `plan`; multiply-adds in evaluation mode.

    `costs(model, example_inputs=x)` are those of the model as it is, `costs(model, plan, x)` those of the model that
    `plan` would make of it.

    They follow from the model's dataflow (`recon.plans.CostModel`, which is also the quick way to the costs of
    many plans). Where it can't be traced, and for a plan of mode `per-task`, the converted model is run and measured.

    Args:
        model: the unbranched model; without a plan, any model, branched or not, is run and measured.
        plan: what would be branched; nothing if None.
        example_inputs: a batch of inputs, as the model's forward expects them.

    Raises:
        UsageError: there are no example inputs, or `plan` is not a plan.
        UnknownNameError, PlanError, UsageError: as `recon.convert`.
        FanError: as `recon.convert`, where the model can't be traced.
    """
    if example_inputs is None or not isinstance(plan, (BranchPlan, NoneType)):
        raise UsageError(
            f"recon.costs needs a BranchPlan or None, and example inputs, but got {type_name(plan)} and "
            f"{type_name(example_inputs)}. Write recon.costs(model, example_inputs=x), or recon.costs(model, plan, x)."
        )
    if plan is not None and plan.mode == "fan":
        model_costs = CostModel(model, plan.tasks, example_inputs)
        found = model_costs.of(plan.on(model).layers)
        return Costs(found.parameters, found.macs, found.activation_bytes, measured=not model_costs.traced)
    if plan is not None:
        model = convert(model, plan, example_inputs)
    macs = count_macs(model, example_inputs)
    try:
        activation_bytes = count_activation_bytes(model, example_inputs)
    except UsageError:
        activation_bytes = None
    return Costs(count_parameters(model.parameters()), macs, activation_bytes)
