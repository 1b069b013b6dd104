"""The plan that covers the most conflict within a budget: a mixed-integer program over the model's dataflow graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from recon.branching import Partition
from recon.errors import FanError, PlanError
from recon.plans.costing.cost_model import CostModel, PlanCosts

_ENUMERATED = 10  # layers
_FINENESS = 10**6
_CUTS = 50  # answers of the program that the cost model may refuse before we settle for a plan that is not the best


@dataclass(frozen=True)
class Budget:
    """What a branched model may cost, as ratios to the unbranched one: parameters, forward multiply-adds, or both."""

    max_params: float | None = None
    max_macs: float | None = None

    def __post_init__(self) -> None:
        if not self._limits:
            raise PlanError("The budget has no limit. Give max_params=..., max_macs=... or both.")
        for name, limit in self._limits.items():
            if not limit >= 1:
                raise PlanError(
                    f"{name} is {limit:g}, a ratio to the unbranched model, which itself costs 1. Give more than 1, "
                    "such as 1.05."
                )

    def __str__(self) -> str:
        return " and ".join(f"{name}={limit:.10g}" for name, limit in self._limits.items())

    @property
    def _limits(self) -> dict[str, float]:
        limits = {"max_params": self.max_params, "max_macs": self.max_macs}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def allows(self, costs: PlanCosts) -> bool:
        """Whether a plan with these costs fits."""
        return self.overrun(costs) <= 1

    def overrun(self, costs: PlanCosts) -> float:
        """The larger of the costs as shares of their limits; at most 1 if both fit."""
        ratios = {"max_params": costs.parameters_ratio, "max_macs": costs.macs_ratio}
        return max(ratios[name] / limit for name, limit in self._limits.items())


class Chooser:
    """Chooses layers of one model under any budget.

    An operation runs once per group as soon as a value that reaches it has fanned out, so whatever lies below a fan is
    branched at no further multiply-adds. Where partitions nest, the finest one that reaches an operation decides how
    often it runs: its cost is the largest that any of the branched layers would cause alone. So the multiply-adds of a
    plan are a sum over steps, each a set of layers of which the first one pays and the others are free; the
    parameters are a sum over layers. With x_l = 1 for a branched layer and r_s = 1 for a step that is paid, the most
    conflict within a budget is the mixed-integer program

        maximise sum values_l x_l   subject to   r_s >= x_l (l takes s),
        sum parameters_l x_l <= (max_params - 1) parameters,   sum macs_s r_s <= (max_macs - 1) macs,

    which HiGHS (`scipy.optimize.milp`) solves to optimality. Every answer is checked by the cost model; one that it
    refuses is excluded along with all larger ones, since more branching never costs less.

    `values` are what branching a layer parts, conflicts or shares of them (to a millionth of the largest, since the
    program counts in whole numbers); a layer without any is left alone. `partitions` say how
    each layer splits the tasks, in model order. `members` are the layers that a unit stands for: all of them are
    branched, so it costs what they cost together.
    """

    def __init__(
        self,
        costs: CostModel,
        partitions: Mapping[str, Partition],
        values: Mapping[str, float],
        members: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.costs, self.values = costs, _whole(values)
        self._plans = {
            name: dict.fromkeys((members or {}).get(name, [name]), partition) for name, partition in partitions.items()
        }
        worthwhile = [name for name in partitions if self.values.get(name)]
        if costs.traced:
            worthwhile = [name for name in worthwhile if self._cost([name]) is not None]
        self._candidates = {name: self._plans[name] for name in worthwhile}
        program = _Program(costs, self._candidates, self.values) if costs.traced and self._candidates else None
        self._program = program if program is not None and program.holds else None
        self._enumerates = costs.traced and self._program is None and len(self._candidates) <= _ENUMERATED

    @property
    def is_exact(self) -> bool:
        """Whether `best` is the best there is."""
        return self._program is not None or self._enumerates

    def best(self, budget: Budget) -> list[str]:
        """The layers that cover the most conflict within the budget; of several such sets, the cheapest.

        Where the program does not hold, all sets of up to ten layers are compared. Of more, or where the model could
        not be traced, it is the better of two greedy plans, by score and from the last layers on. The former is never
        worse than the longest beginning of the ranking that fits.
        """
        if self._enumerates and (fitting := [names for names, costs in self._all_plans if budget.allows(costs)]):
            return max(fitting, key=self._worth)
        excluded: list[list[str]] = []
        while self._program is not None and len(excluded) < _CUTS:
            chosen = self._program.solve(budget, excluded)
            if not chosen:
                break
            if self._fits(chosen, budget):
                return chosen
            excluded.append(chosen)
        by_score = sorted(self._candidates, key=lambda name: -self.values[name])
        plans = [self.fill(order, budget) for order in (by_score, [*self._candidates][::-1])]
        return max(plans, key=self._worth)

    def fill(self, order: Sequence[str], budget: Budget, skip: bool = True) -> list[str]:
        """As many layers of `order` as fit; one that does not is passed over with `skip`, and otherwise the end."""
        chosen = take(order, lambda names: self._fits(names, budget), skip)
        if not chosen:
            self._refuse(order if skip else order[:1], budget)
        return chosen

    @cached_property
    def _all_plans(self) -> list[tuple[list[str], PlanCosts]]:
        sets = [list(names) for k in range(len(self._candidates)) for names in combinations(self._candidates, k + 1)]
        return [(names, costs) for names in sets if (costs := self._cost(names)) is not None]

    def _worth(self, names: Sequence[str]) -> int:
        return sum(self.values[name] for name in names)

    def _fits(self, names: Iterable[str], budget: Budget) -> bool:
        costs = self._cost(names)
        return costs is not None and budget.allows(costs)

    def _cost(self, names: Iterable[str]) -> PlanCosts | None:
        """What these layers cost; None where the model cannot be branched there."""
        try:
            return self.costs.of(_together(self._plans[name] for name in names))
        except FanError:
            return None

    def _refuse(self, names: Sequence[str], budget: Budget) -> None:
        alone = {name: costs for name in names if (costs := self._cost([name])) is not None}
        if not alone:
            raise PlanError("No layer that can be branched has a conflict, so there is nothing to cover.")
        cheapest = min(alone, key=lambda name: budget.overrun(alone[name]))
        parameters, macs = _up(alone[cheapest].parameters_ratio), _up(alone[cheapest].macs_ratio)
        raise PlanError(
            f"No layer fits {budget}. The cheapest, {cheapest!r}, would need {parameters}x the parameters and "
            f"{macs}x the multiply-adds."
        )


def take(order: Sequence[str], fits: Callable[[list[str]], bool], skip: bool) -> list[str]:
    """Layers of `order`, as long as they fit; one that does not is passed over with `skip`, and otherwise the end."""
    chosen: list[str] = []
    for name in order:
        if fits([*chosen, name]):
            chosen.append(name)
        elif not skip:
            break
    return chosen


_Plan = Mapping[str, Partition]  # a layer's or a unit's: what is branched for it


def _whole(values: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers as they are; others as millionths of the largest."""
    unit = 1 if all(value == int(value) for value in values.values()) else max(values.values()) / _FINENESS
    return {name: round(value / unit) for name, value in values.items()}


def _together(plans: Iterable[_Plan]) -> dict[str, Partition]:
    return {layer: partition for plan in plans for layer, partition in plan.items()}


class _Program:
    """The variables x of the layers, then r of the steps in which operations run more often.

    Attributes:
        holds: whether an operation's cost is the largest that one layer causes alone, as seen with all of them
            branched, and with all but one. It is not where partitions cross, or where what one layer serves shows only
            once another is branched.
    """

    def __init__(self, costs: CostModel, plans: Mapping[str, _Plan], values: Mapping[str, int]) -> None:
        self.names = list(plans)
        plain, macs = costs.of({}), np.array(costs.operation_macs({}))
        macs_alone = np.array([costs.operation_macs(plan) for plan in plans.values()])
        self.holds = _is_largest(costs, plans, macs_alone)
        added = np.array([costs.of(plan).parameters for plan in plans.values()]) - plain.parameters
        steps = _steps(macs_alone - macs)
        free, none = np.zeros(len(steps)), np.zeros(len(self.names))
        self._parameters = np.concatenate([added / max(1, plain.parameters), free])
        self._macs = np.concatenate([none, np.array([*steps.values()]) / max(1, plain.macs)])
        # r_s - x_l >= 0 for each layer l that takes the step s.
        takes = [(step, layer) for step, layers in enumerate(steps) for layer in layers]
        rows = np.repeat(np.arange(len(takes)), 2)
        columns = np.array([(len(self.names) + step, layer) for step, layer in takes], dtype=int).ravel()
        signs = np.tile([1.0, -1.0], len(takes))
        shape = len(takes), len(self._macs)
        order = LinearConstraint(csr_array((signs, (rows, columns)), shape=shape), lb=0)
        self._order = [order] if takes else []
        # Values are whole numbers, so that half of one decides between equals alone.
        ties = sum(part / max(part.sum(), 1e-12) for part in (self._parameters, self._macs)) / 4
        self._objective = ties - np.concatenate([[values[name] for name in self.names], free])
        self._integrality = np.concatenate([none + 1, free])

    def solve(self, budget: Budget, excluded: Sequence[Sequence[str]]) -> list[str]:
        """The best layers, none of `excluded` wholly among them."""
        limits = [(self._parameters, budget.max_params), (self._macs, budget.max_macs)]
        constraints = [LinearConstraint(costs[None], ub=limit - 1) for costs, limit in limits if limit is not None]
        constraints += [LinearConstraint(self._indicator(names)[None], ub=len(names) - 1) for names in excluded]
        found = milp(
            self._objective,
            integrality=self._integrality,
            bounds=Bounds(0, 1),
            constraints=[*self._order, *constraints],
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, found.message  # branching nothing is a solution
        return [name for name, x in zip(self.names, found.x, strict=False) if x > 0.5]

    def _indicator(self, names: Sequence[str]) -> NDArray[np.float64]:
        indicator = np.zeros(len(self._objective))
        indicator[: len(self.names)] = [name in names for name in self.names]
        return indicator


def _is_largest(costs: CostModel, plans: Mapping[str, _Plan], macs_alone: NDArray[np.int64]) -> bool:
    """Whether each operation's multiply-adds are the largest that a layer causes alone."""
    for left_out in (None, *plans) if len(plans) > 1 else ():
        some = {name: plan for name, plan in plans.items() if name != left_out}
        largest = macs_alone[[name in some for name in plans]].max(axis=0)
        try:
            if costs.operation_macs(_together(some.values())) != largest.tolist():
                return False
        except FanError:  # they can be branched one by one, but not together
            return False
    return True


def _steps(added: NDArray[np.int64]) -> dict[tuple[int, ...], int]:
    """What branching adds as steps: `{layers: multiply-adds that they add, however many of them are branched}`.

    `added` are the (layers, operations) multiply-adds that each layer adds alone. Of several, the largest is added, so
    that an operation's numbers, in order, are steps that all layers with a number as large share.
    """
    steps: dict[tuple[int, ...], int] = {}
    for operation in added.clip(min=0).T:
        levels = np.unique(np.append(operation, 0))
        for below, level in pairwise(levels.tolist()):
            layers = tuple(np.flatnonzero(operation >= level).tolist())
            steps[layers] = steps.get(layers, 0) + level - below
    return steps


def _up(ratio: float) -> str:
    """Rounded up, so that it is large enough as a budget."""
    return f"{np.ceil(ratio * 1e4) / 1e4:g}"
