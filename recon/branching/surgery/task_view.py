"""One task's view of a branched model: the original architecture over the task's own copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recon.branching.fans.compilers import uncompiled
from recon.branching.modules.branched import Branched, BranchedParameter
from recon.branching.modules.classes import original_class
from recon.branching.modules.statistics import CALL_HOOKS, BranchedStatistics, plain_state
from recon.branching.partition import Group, Partition
from recon.support.network.references import STRUCTURE, replace_references


class ByTask(dict[str, Any]):
    """`{task: value}`: an attribute in which a forward, run once per task, leaves a different value for each."""


class TaskView:
    """The original modules, rebuilt around the branched model's parameters and buffers: no tensor is copied.

    `network` is the view of the whole model for `task`. `beside` are all tasks, if the views of all of them run one
    after the other as one forward. A shared buffer is then written once: only the first of the tasks that share it has
    the buffer itself, the others have scratch copies. Forward hooks on a branched layer run on its copies.
    """

    def __init__(self, branched: nn.Module, task: str, beside: Group = ()) -> None:
        self.task = task
        self.beside = beside
        self._views: dict[nn.Module, nn.Module] = {}
        self._given: dict[nn.Module, dict[str, Any]] = {}
        self.network = self._view(branched, beside)
        for module in self._given:
            self._given[module] = self._set_attributes(module)

    @property
    def modules(self) -> dict[nn.Module, nn.Module]:
        """`{module of the branched model: its view}`, without the containers of copies."""
        return {module: self._views[module] for module in self._given}

    def changes(self) -> dict[tuple[nn.Module, str], Any]:
        """The attributes that the forward has set, by module of the branched model and name."""
        return {
            (module, name): value
            for module, given in self._given.items()
            for name, value in vars(self._views[module]).items()
            if name not in STRUCTURE and _identity(value) != given.get(name, _identity(None))
        }

    def _view(self, module: nn.Module, sharers: Group) -> nn.Module:
        """The view of a module whose state these tasks share."""
        if module not in self._views:
            if isinstance(module, Branched):
                group = _group_of(self.task, module.partition)
                self._views[module] = self._view(module.branch(group), group)
                self._add_hooks(module)
            elif isinstance(module, BranchedStatistics):
                group = _group_of(self.task, module.branches._partition)
                buffers = self._own_or_scratch(module.branches.at(group), group)
                if module._buffers:  # registered since, for all groups
                    buffers = {**buffers, **module._buffers}
                self._view_around(module, sharers, buffers)
                self._add_hooks(module)
            elif isinstance(module, torch.jit.ScriptModule):  # nothing in it is branched
                self._views[module] = module
            else:
                self._view_around(module, sharers, self._own_or_scratch(module, sharers))
        return self._views[module]

    def _view_around(self, module: nn.Module, sharers: Group, buffers: dict[str, Tensor | None]) -> nn.Module:
        view: nn.Module = object.__new__(original_class(module))
        self._views[module], self._given[module] = view, {}
        state = plain_state(module) if isinstance(module, BranchedStatistics) else vars(module)
        vars(view).update(state, _modules={}, _buffers=buffers)
        for name, child in state["_modules"].items():
            if isinstance(child, BranchedParameter):
                holder = child.branch(_group_of(self.task, child.partition))
                vars(view)["_parameters"] = {**view._parameters, name: holder._parameters[name]}
            else:
                view._modules[name] = None if child is None else self._view(child, sharers)
        uncompiled(view)
        return view

    def _own_or_scratch(self, module: nn.Module, sharers: Group) -> dict[str, Tensor | None]:
        """The module's buffers, to be written by one of the tasks that share them."""
        if not self.beside or self.task == sharers[0]:
            return module._buffers
        return {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}

    def _set_attributes(self, module: nn.Module) -> dict[str, Any]:
        attributes = vars(self._views[module])
        for name, value in attributes.items():
            if name not in STRUCTURE:
                mine = value[self.task] if type(value) is ByTask else value
                if self.beside and isinstance(mine, (list, dict, set)):  # a cache, perhaps: other tasks must not see it
                    mine = copy.copy(mine)
                attributes[name] = replace_references(mine, lambda other: self._views.get(other, other))
        return {name: _identity(value) for name, value in attributes.items() if name not in STRUCTURE}

    def _add_hooks(self, wrapper: nn.Module) -> None:
        hooks = {name: vars(wrapper)[name] for name in CALL_HOOKS if vars(wrapper)[name]}
        for name, added in hooks.items() if self.beside else ():
            attributes = vars(self._views[wrapper])
            attributes[name] = {**attributes[name], **added} if isinstance(added, dict) else added


def _identity(value: Any) -> Any:
    """A value that changes if the attribute is replaced, or the list, dict or set in it is filled."""
    if isinstance(value, dict):
        return id(value), [(id(key), id(item)) for key, item in value.items()]
    return (id(value), [id(item) for item in value]) if isinstance(value, (list, set)) else id(value)


def _group_of(task: str, partition: Partition) -> Group:
    # Statistics of a module that only some tasks reach have no group for the others, which never use them.
    return partition.groups[partition.label_of.get(task, 0)]
