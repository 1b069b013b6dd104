"""joint_loader(): one batch of each task's loader is one joint step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from recon.errors import LoaderError, ProblemError, ReconError, UsageError, type_name
from recon.support.loaders import LoaderOfLoaders, all_inner_loaders
from recon.support.network.forward import Batch, Inputs
from recon.support.random_states import global_states_kept, keeps_its_place
from recon.training.batches.batch_stream import batch_count, loader_error

Length = Literal["longest", "shortest"] | int
"""When an epoch of a joint loader ends: with the longest of its loaders, with the shortest, or after so many steps."""


def joint_loader(loaders: Mapping[str, Iterable[Any]], length: Length = "longest") -> JointLoader:
    """Join the loaders of tasks that have data of their own: each step has a batch of every task.

    Yields `{task name: (inputs, target)}`, which `recon.train`, `recon.profile` and `recon.evaluate` accept; in a loop
    of your own, `recon.Window` makes one step of it. Each loader keeps its own batch size, workers and sampler.

    Every epoch begins all loaders anew. Each pass through a loader has random numbers of its own, which depend on
    torch's global generator at the epoch's beginning, so that an interrupted training finds its place in every loader.

    Args:
        loaders: `{task name: loader}`, each of which yields `(inputs, target)` or `(inputs, {task name: target})`. A
            target that is missing or None leaves the task out of that step.
        length: `"longest"`: an epoch has the steps of the longest loader; the others begin again, reshuffled by their
            own samplers. `"shortest"`: it ends with the first loader that ends. A number: so many steps; loaders begin
            again as needed. With fewer steps than a loader has batches, let it shuffle: each epoch begins at its
            beginning.

    Raises:
        UsageError: no loaders, something that cannot be iterated, a length of another kind, or `"longest"` of a loader
            that does not say how long it is.
        LoaderError: while it is iterated: a loader, named by its task, is empty, cannot begin again, or raised.
        ProblemError: while it is iterated: a loader yields something else.
    """
    return JointLoader(loaders, length)


class JointLoader(LoaderOfLoaders):
    """What `joint_loader` makes; see there."""

    def __init__(self, loaders: Mapping[str, Iterable[Any]], length: Length = "longest") -> None:
        _check_loaders(loaders)
        self.loaders = dict(loaders)
        self.length = length
        if length == "longest":
            unknown = [task for task, loader in self.loaders.items() if batch_count(loader) is None]
            if unknown:
                raise UsageError(
                    f"The loader of task {unknown[0]!r} does not say how many batches it has, so which one is the "
                    "longest is not known. Give the number of steps, length=1000, or length='shortest'."
                )
        elif length != "shortest" and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise UsageError(
                f"length is {length!r}. Choose 'longest', 'shortest', or a number of steps that is at least 1."
            )

    def inner_loaders(self) -> Mapping[str, Iterable[Any]]:
        """The tasks' loaders."""
        return self.loaders

    def __len__(self) -> int:
        if isinstance(self.length, int):
            return self.length
        known = [size for loader in self.loaders.values() if (size := batch_count(loader)) is not None]
        if len(known) < len(self.loaders):
            raise TypeError("the number of joint steps is not known: a loader does not say how many batches it has")
        return max(known) if self.length == "longest" else min(known)

    def __iter__(self) -> Iterator[Batch]:
        # Drawn now, not with the first batch: this is where an epoch begins.
        seed = int(torch.randint(2**62, ()))
        for loader in all_inner_loaders(self).values():
            if keeps_its_place(loader):  # it may be in the middle of a pass, and goes on there, as after a resume
                loader.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]
        return self._batches([_Passes(task, self.loaders[task], seed + n) for n, task in enumerate(self.loaders)])

    def once(self) -> Iterator[Batch]:
        """Joint steps in which each loader's batches are there once; at the end, some tasks are left."""
        passes = [_Passes(task, loader, None) for task, loader in self.loaders.items()]
        while passes:
            pairs = {each: each.next(begin_again=False) for each in passes}
            passes = [each for each, pair in pairs.items() if pair is not None]
            if passes:
                yield {each.task: pair for each, pair in pairs.items() if pair is not None}

    def _batches(self, passes: Sequence[_Passes]) -> Iterator[Batch]:
        again = self.length != "shortest"
        for _ in range(len(self)) if again else count():
            batch: dict[str, tuple[Any, Any]] = {}
            for each in passes:
                pair = each.next(begin_again=again)
                if pair is None:
                    return
                batch[each.task] = pair
            yield batch


class _Passes:
    """One pass through a task's loader after the other."""

    def __init__(self, task: str, loader: Iterable[Any], seed: int | None) -> None:
        self.task, self.loader, self.seed = task, loader, seed
        self.number = 0
        self.drawn = 0  # batches of this pass
        self._iterator: Iterator[Any] | None = None

    def next(self, begin_again: bool) -> tuple[Any, Any] | None:
        """The next batch as `(inputs, target)`; None at the end."""
        if self._iterator is None:
            batch = self._begin()
            if batch is _END:  # one that keeps its place may have been at the end
                batch = self._begin()
            if batch is _END:
                raise LoaderError(
                    f"The loader of task {self.task!r} gave no batch. Check that its data set is not empty, and pass a "
                    "DataLoader or a list: an iterator, such as a generator, gives its batches only once."
                )
        else:
            batch = self._draw()
            if batch is _END and begin_again:
                batch = self._begin()
                if batch is _END:
                    raise LoaderError(
                        f"The loader of task {self.task!r} ended, and gave no batch when it began again. An iterator, "
                        "such as a generator, gives its batches only once: pass a DataLoader or a list, or join the "
                        "loaders with length='shortest'."
                    )
        if batch is _END:
            return None
        self.drawn += 1
        return _pair(self.task, batch)

    def _begin(self) -> Any:
        """The first batch of a new pass."""
        self.number, self.drawn = self.number + 1, 0
        # A sampler draws its order with the first batch, or its seed: here, in the middle of an epoch, from states
        # that depend on the pass alone. A training that resumes draws the same again.
        with _seeded(self.seed, self.number):
            try:
                self._iterator = iter(self.loader)
            except Exception as error:
                raise self._error(error) from error
            return self._draw()

    def _draw(self) -> Any:
        assert self._iterator is not None
        try:
            return next(self._iterator, _END)
        except ReconError:
            raise
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> LoaderError:
        return loader_error(error, f"the loader of task {self.task!r} for batch {self.drawn + 1} of pass {self.number}")


_END = object()


@contextmanager
def _seeded(seed: int | None, number: int) -> Iterator[None]:
    """The global generators seeded for a pass, and put back afterwards; as they are without a seed."""
    if seed is None:
        yield
        return
    with global_states_kept():
        of_pass = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1
        random.seed(of_pass)
        np.random.seed(of_pass % 2**32)
        torch.manual_seed(of_pass)
        yield


def _pair(task: str, batch: Any) -> tuple[Any, Any]:
    """`(inputs, target)` of what a task's loader gave."""
    if not isinstance(batch, (tuple, list)) or isinstance(batch, Inputs) or len(batch) != 2:
        got = (
            f"({', '.join(type(part).__name__ for part in batch)})"
            if type(batch) in (tuple, list)
            else type_name(batch)
        )
        raise ProblemError(
            f"The loader of task {task!r} must yield (inputs, target), or (inputs, {{{task!r}: target}}), but gave "
            f"{got}."
        )
    inputs, target = batch
    if isinstance(target, Mapping) and task in target:
        return inputs, target[task]
    return inputs, target


def _check_loaders(loaders: object) -> None:
    if not isinstance(loaders, Mapping) or not loaders:
        got = "none" if isinstance(loaders, Mapping) else type_name(loaders)
        raise UsageError(f"joint_loader needs {{task name: loader}}, but got {got}.")
    for task, loader in loaders.items():
        if not isinstance(task, str):
            raise UsageError(f"joint_loader needs {{task name: loader}}, but a loader has the name {task!r}.")
        if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, Mapping)):
            raise UsageError(
                f"The loader of task {task!r} is {type_name(loader)}. Pass what yields its batches, such as a "
                "DataLoader."
            )
