"""The plan that covers the most conflict within a budget: a mixed-integer program over the model's dataflow graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from recon.cost_model import CostModel, PlanCosts
from recon.errors import PlanError, UsageError
from recon.partition import Partition, refine

_CUTS = 50  # answers of the program that the cost model may refuse before we settle for a plan that is not the best


@dataclass(frozen=True)
class Budget:
    """What a branched model may cost, as ratios to the unbranched one.

    Args:
        max_params: of the parameters; any number of them when not given.
        max_macs: of the forward multiply-adds; any number of them when not given.

    Raises:
        PlanError: a ratio is below 1, which is the unbranched model's own, or neither is given.
    """

    max_params: float | None = None
    max_macs: float | None = None

    def __post_init__(self) -> None:
        if not self._limits:
            raise PlanError("The budget has no limit. Give max_params=..., max_macs=... or both.")
        for name, limit in self._limits.items():
            if not limit >= 1:
                raise PlanError(
                    f"{name} is {limit:g}, a ratio to the unbranched model, which costs 1 itself. Take more than 1, "
                    "such as 1.05."
                )

    def __str__(self) -> str:
        return " and ".join(f"{name}={limit:g}" for name, limit in self._limits.items())

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

    Whether a layer is branched is a binary variable x_l. An operation runs once per group as soon as a value that
    reaches it has fanned out, so that r_n >= x_l for the operations n of layer l and r_n >= r_m along every edge m -> n
    of the dataflow graph. The parameters are linear in x and the multiply-adds in r: inside what runs per group anyway,
    branching is free of multiply-adds. r needs no integrality: the least r that an integer x allows is integer. With
    partitions that nest, r_n is kept for each of them, from the coarsest on.

    HiGHS (through `scipy.optimize.milp`) solves this to optimality. Every answer is checked by the cost model itself;
    one that it refuses is excluded along with all larger ones, since more branching never costs less.

    Args:
        costs: of the unbranched model.
        partitions: `{layer: how it splits the tasks}`; where they do not nest, or the model could not be traced, plans
            are not optimal: see `best`.
        values: `{layer: conflicts that branching it parts}`; a layer without any is left alone.
    """

    def __init__(self, costs: CostModel, partitions: Mapping[str, Partition], values: Mapping[str, int]) -> None:
        self.costs, self.partitions, self.values = costs, partitions, values
        self._candidates = {name: partitions[name] for name in costs.layers if values.get(name)}
        levels = sorted(set(self._candidates.values()), key=lambda partition: len(partition.groups))
        self.is_exact = costs.traced and all(refine(one, finer) == finer for one, finer in pairwise(levels))
        solvable = self.is_exact and self._candidates
        self._program = _Program(costs, self._candidates, levels, values) if solvable else None

    def best(self, budget: Budget) -> list[str]:
        """The layers that cover the most conflict within the budget; of several such sets, the cheapest.

        If the program cannot be stated (`is_exact`), the better of two greedy plans: by score, and from the last
        layers on. Neither is worse than the longest beginning of the ranking that fits.

        Raises:
            PlanError: no layer with a conflict fits; the message names the cheapest.
        """
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
        return max(plans, key=lambda names: sum(self.values[name] for name in names))

    def fill(self, order: Sequence[str], budget: Budget) -> list[str]:
        """The layers of `order`, each of which is taken if it fits beside those taken before it.

        Raises:
            PlanError: none fits; the message names the cheapest.
        """
        chosen: list[str] = []
        for name in order:
            if self._fits([*chosen, name], budget):
                chosen.append(name)
        if not chosen:
            self._refuse(order, budget)
        return chosen

    def _fits(self, names: Iterable[str], budget: Budget) -> bool:
        return budget.allows(self._cost(names))

    def _cost(self, names: Iterable[str]) -> PlanCosts:
        return self.costs.of({name: self.partitions[name] for name in names})

    def _refuse(self, names: Sequence[str], budget: Budget) -> None:
        if not names:
            raise PlanError("No layer of the map has a conflict, so there is nothing that a plan could cover.")
        alone = {name: self._cost([name]) for name in names}
        cheapest = min(alone, key=lambda name: budget.overrun(alone[name]))
        parameters, macs = _up(alone[cheapest].parameters_ratio), _up(alone[cheapest].macs_ratio)
        raise PlanError(
            f"No layer fits {budget}. The cheapest, {cheapest!r}, would take {parameters}x the parameters and "
            f"{macs}x the multiply-adds."
        )


class _Program:
    """The variables x of the layers, then r of the operations, level by level."""

    def __init__(
        self,
        costs: CostModel,
        partitions: Mapping[str, Partition],
        levels: Sequence[Partition],
        values: Mapping[str, int],
    ) -> None:
        self.names = list(partitions)
        graph, nodes = costs.graph, list(costs.graph)
        column = {name: i for i, name in enumerate(self.names)}
        place = {node: len(self.names) + i for i, node in enumerate(nodes)}
        size = len(self.names) + len(levels) * len(nodes)
        plain = costs.of({})
        self._parameters, self._macs = np.zeros((2, size))
        for name, partition in partitions.items():
            added = costs.of({name: partition}).parameters - plain.parameters
            self._parameters[column[name]] = added / plain.parameters
        larger, smaller = [], []  # of pairs of variables
        for number, level in enumerate(levels):
            coarser, shift = levels[number - 1] if number else None, number * len(nodes)
            for node, data in graph.nodes(data=True):
                layer = data["layer"]
                if layer in column and len(partitions[layer].groups) >= len(level.groups):
                    larger.append(place[node] + shift)
                    smaller.append(column[layer])
                runs = _groups(level, data["tasks"]) - (_groups(coarser, data["tasks"]) if coarser else 1)
                self._macs[place[node] + shift] = data["macs"] * runs / max(1, plain.macs)
            larger += [place[node] + shift for _, node in graph.edges]
            smaller += [place[node] + shift for node, _ in graph.edges]
        row = np.arange(len(larger))
        rows, columns = np.tile(row, 2), np.array(larger + smaller, dtype=int)
        signs = np.repeat([1.0, -1.0], len(row))
        self._order = LinearConstraint(csr_array((signs, (rows, columns)), shape=(len(row), size)), lb=0)
        worth = np.zeros(size)
        worth[: len(self.names)] = [values[name] for name in self.names]
        # Values are whole, so that half of one decides between equals alone.
        tie = [costs / max(costs.sum(), 1e-12) for costs in (self._parameters, self._macs)]
        self._objective = -worth + 0.25 * (tie[0] + tie[1])
        self._integrality = np.arange(size) < len(self.names)

    def solve(self, budget: Budget, excluded: Sequence[Sequence[str]]) -> list[str]:
        """The best layers, none of `excluded` wholly among them."""
        limits = [(self._parameters, budget.max_params), (self._macs, budget.max_macs)]
        constraints = [LinearConstraint(costs[None], ub=limit - 1) for costs, limit in limits if limit is not None]
        constraints += [LinearConstraint(self._indicator(names)[None], ub=len(names) - 1) for names in excluded]
        found = milp(
            self._objective,
            integrality=self._integrality,
            bounds=Bounds(0, 1),
            constraints=[self._order, *constraints],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:  # cannot be: branching nothing is a solution
            raise UsageError(f"HiGHS found no plan: {found.message}")
        return [name for name, x in zip(self.names, found.x, strict=False) if x > 0.5]

    def _indicator(self, names: Sequence[str]) -> NDArray[np.float64]:
        indicator = np.zeros(len(self._objective))
        indicator[: len(self.names)] = [name in names for name in self.names]
        return indicator


def _groups(partition: Partition, tasks: Sequence[str]) -> int:
    return len(partition.restrict(tuple(tasks)).groups)


def _up(ratio: float) -> str:
    """Rounded up, so that it would do as a budget."""
    return f"{np.ceil(ratio * 1e4) / 1e4:g}"
