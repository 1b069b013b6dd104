"""Where values fan out under a plan, and what then runs once per group: a task fan, but for partitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from recon.branching import Partition
from recon.branching.partition import Group, refine
from recon.errors import FanError
from recon.plans.costing.dataflow import Dataflow, Operation
from recon.support.network.layers import find_layers, places

SHARED = 0
"""The number of the partition with all tasks in one group: what is computed once."""


class Partitions:
    """The partitions that occur, by number: their refinements are looked up, not worked out again."""

    def __init__(self, tasks: Group) -> None:
        self._all = [Partition(tasks, (SHARED,) * len(tasks))]
        self._numbers = {self._all[SHARED]: SHARED}
        self._refined: dict[tuple[int, int], int] = {}
        self._restricted: dict[tuple[int, Group], int] = {}
        self._overlaid: dict[tuple[int, int], int] = {}
        self._split: dict[tuple[int, int], int] = {}
        self.sizes = [1]

    def number(self, partition: Partition) -> int:
        """Its number; refused if it has no task."""
        found = self._numbers.get(partition)
        if found is None:
            if not partition.tasks:
                raise FanError("Values computed for different tasks meet, but no task has all of them.")
            found = self._numbers[partition] = len(self._all)
            self._all.append(partition)
            self.sizes.append(len(partition.groups))
        return found

    def __getitem__(self, number: int) -> Partition:
        return self._all[number]

    def refinement(self, numbers: Iterable[int], result: int = SHARED) -> int:
        """The common refinement of these partitions and `result`."""
        for number in numbers:
            if number not in (result, SHARED):
                result = number if result == SHARED else self._refine(result, number)
        return result

    def _refine(self, one: int, other: int) -> int:
        found = self._refined.get((one, other))
        if found is None:
            found = self._refined[one, other] = self.number(refine(self._all[one], self._all[other]))
        return found

    def restrict(self, number: int, tasks: Group | None) -> int:
        """The groups of some tasks; what is shared stays so."""
        if number == SHARED or tasks is None:
            return number
        found = self._restricted.get((number, tasks))
        if found is None:
            found = self._restricted[number, tasks] = self.number(self._all[number].restrict(tasks))
        return found

    def overlay(self, one: int, other: int) -> int:
        """The partition of the tasks that either covers, into those which agree on both."""
        found = self._overlaid.get((one, other))
        if found is None:
            labels, more = self._all[one].label_of, self._all[other].label_of
            tasks = [task for task in self._all[SHARED].tasks if task in labels or task in more]
            groups: dict[tuple[int | None, int | None], list[str]] = {}
            for task in tasks:
                groups.setdefault((labels.get(task), more.get(task)), []).append(task)
            found = self._overlaid[one, other] = self.number(Partition.of_groups(groups.values(), tasks))
        return found

    def split(self, before: int, after: int) -> int:
        """How many groups of `after` are less than a group of `before`."""
        found = self._split.get((before, after))
        if found is None:
            whole = set(self._all[before].groups)
            found = self._split[before, after] = sum(group not in whole for group in self._all[after].groups)
        return found


@dataclass(frozen=True)
class Fans:
    """How a forward pass fans out."""

    values: list[int]  # the number of each value's partition
    arriving: set[str]  # the modules that values which have fanned out reach


class FanOut:
    """The branched form of one model, under any plan, as `recon.convert` makes it.

    It is found from what a forward does in training mode and in evaluation mode. Where statistics are kept by group,
    and which modules serve some tasks only, is seen in training mode.
    """

    def __init__(self, model: nn.Module, tasks: Group, training: Dataflow, evaluation: Dataflow) -> None:
        self.tasks = tasks
        self.flows = (training, evaluation)
        self.partitions = Partitions(tasks)
        numbers = {parameter: number for number, parameter in enumerate(training.parameters)}
        self._of_layer = {layer.name: [numbers[p] for p in layer.parameters.values()] for layer in find_layers(model)}
        paths = {module: path for path, module in model.named_modules()}
        self._of_module = {
            paths[place.owner]: [numbers[p] for p in place.parameters.values()]
            for place in places(model)
            if isinstance(place.owner, nn.Module)
        }
        self._serves = _served_in_part(model, tasks, training.served)

    def parameters(self, layers: Mapping[str, Partition]) -> list[int]:
        """The partition of each parameter."""
        result = [SHARED] * len(self.flows[0].parameters)
        for name, partition in layers.items():
            number = self.partitions.number(partition)
            for parameter in self._of_layer[name]:
                result[parameter] = number
        return result

    def fans(self, parameters: Sequence[int]) -> tuple[list[int], list[int]]:
        """The partition of each value of the training and of the evaluation forward."""
        training, evaluation = self.flows
        plain = self._spread(training, parameters, {}, {})
        statistics: dict[str, int] = {}
        for path, value in training.writes:
            statistics[path] = self.partitions.refinement([plain.values[value]], statistics.get(path, SHARED))
        statistics = {path: number for path, number in statistics.items() if number != SHARED}
        whole = self._spread(training, parameters, statistics, {}) if statistics else plain
        only = self._task_modules(parameters, whole.arriving)
        if only:
            try:
                restricted = [self._spread(flow, parameters, statistics, only) for flow in self.flows]
                if self._all_tasks_complete(whole.values, restricted, only):
                    return restricted[0].values, restricted[1].values
            except FanError:
                pass
        return whole.values, self._spread(evaluation, parameters, statistics, {}).values

    def _spread(
        self, flow: Dataflow, parameters: Sequence[int], statistics: Mapping[str, int], only: Mapping[str, Group]
    ) -> Fans:
        """Let values fan out, operation by operation.

        `parameters` are their partitions; the modules in `statistics` keep statistics by group, and run once per group
        as a whole; those in `only` run for some tasks only.
        """
        refinement, restrict, sizes = self.partitions.refinement, self.partitions.restrict, self.partitions.sizes
        values = [*parameters, *(statistics.get(path, SHARED) for path in flow.owners)]
        arriving: set[str] = set()
        inside: list[int] = []  # by call: the groups that all within it runs for
        tasks: list[Group | None] = []
        for step in flow.steps:
            if isinstance(step, Operation):
                number = refinement([values[i] for i in step.inputs], inside[step.within])
                values.append(restrict(number, tasks[step.within]))
                continue
            around, served = (inside[step.around], tasks[step.around]) if inside else (SHARED, None)
            inputs = refinement([values[i] for i in step.inputs], around)
            if sizes[inputs] > sizes[around]:
                arriving.add(step.path)
            if step.path in only and inputs != around:  # what has not fanned out is not restricted
                mine = only[step.path]
                served = mine if served is None else tuple(task for task in served if task in mine)
            own = [parameters[i] for i in self._of_module.get(step.path, ())]
            if step.path in statistics:
                own += [statistics[step.path], inputs]
            inside.append(restrict(refinement(own, around), served))
            tasks.append(served)
            restrict(inputs, served)  # raises where no task is left
        return Fans(values, arriving)

    def _task_modules(self, parameters: Sequence[int], arriving: set[str]) -> dict[str, Group]:
        """The outermost modules, none within a branched layer, that fans reach and that serve some tasks only."""
        layers = [path for path, own in self._of_module.items() if any(parameters[i] for i in own)]
        found: dict[str, Group] = {}
        for path, tasks in self._serves.items():
            if path in arriving and not any(path.startswith(f"{outer}.") for outer in (*found, *layers)):
                found[path] = tasks
        return found

    def _all_tasks_complete(self, whole: Sequence[int], restricted: Sequence[Fans], only: Mapping[str, Group]) -> bool:
        """Whether every task has its output, and the statistics outside of these modules are all updated."""
        for flow, fans in zip(self.flows, restricted, strict=True):
            for task, outputs in flow.outputs.items():
                if any(task not in self.partitions[fans.values[value]].tasks for value in outputs):
                    return False
        return all(
            self.partitions[whole[value]].tasks == self.partitions[restricted[0].values[value]].tasks
            for path, value in self.flows[0].writes
            if not any(f"{path}.".startswith(f"{module}.") for module in only)
        )


def _served_in_part(model: nn.Module, tasks: Group, served: Mapping[Tensor, frozenset[str]]) -> dict[str, Group]:
    """The modules whose parameters serve some of the tasks only, and these tasks; outer modules first."""
    found = {}
    for path, module in model.named_modules():
        reached = frozenset().union(*(served.get(p, frozenset()) for p in module.parameters()))
        if 0 < len(reached) < len(tasks):
            found[path] = tuple(task for task in tasks if task in reached)
    return found
