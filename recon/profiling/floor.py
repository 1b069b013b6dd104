"""The noise floor of a profile: how the gradients of two batches at the same weights agree.

Two batches of one task give two gradients that differ by noise alone. How often they conflict is the task's floor: a
conflict between two tasks is evidence only where it is more frequent than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad

from recon.errors import UsageError
from recon.profiling.batch_gradients import Gradients

FloorEvery = int | Literal["auto"] | None
"""In which of the profiled steps a noise floor is taken."""

_AUTO = 12  # a floor costs about as much as a step: this makes a profile at most 15 % dearer


def floor_steps(floor: FloorEvery) -> int | None:
    """Profiled steps from one floor to the next; None for no floor.

    Raises:
        UsageError: it is neither `auto`, nor None, nor a whole number from 2 on.
    """
    if floor is None or floor == "auto":
        return None if floor is None else _AUTO
    if isinstance(floor, int) and floor >= 2:
        return floor
    raise UsageError(
        f"floor is {floor!r}. Give 'auto', None, or a whole number n of at least 2 for each n-th profiled step: the "
        "second batch of a floor is the next one, whose own step takes none."
    )


class Comparison(NamedTuple):
    """Two batches, in L layers, for the T tasks of the step."""

    layers: list[int]
    tasks: tuple[str, ...]
    products: Tensor  # (L, T, T): g_i of the step times g_j of the second batch
    norms: Tensor  # (L, T), of the step
    second_norms: Tensor  # (L, T); zero for a task that the second batch lacks


def compare(first: Gradients, second: Gradients) -> Comparison:
    """The step's gradients with those of a second batch.

    Raises:
        UsageError: no task is in both.
    """
    if not set(first.tasks) & set(second.tasks):
        raise UsageError(
            f"The floor's batch has the tasks {', '.join(second.tasks) or '-'}; the step has "
            f"{', '.join(first.tasks) or '-'}. Give profiler.floor a second batch of the step's tasks."
        )
    layers, found = first.with_second(second)
    # In the order of the step's tasks; a further column, of zeros, for those that the second batch lacks.
    places = [second.tasks.index(task) if task in second.tasks else len(second.tasks) for task in first.tasks]
    across, second_squares = (pad(values, (0, 1))[..., places] for values in (found.across, found.second_squares))
    return Comparison(layers, first.tasks, across, found.squares.sqrt(), second_squares.sqrt())


class FloorPairs:
    """Brings the gradients of second batches together with those of the steps at the same weights.

    A second batch may come before its step or after it. Which of the two it is shows in the weights: a step whose
    weights are still there, and that has no floor yet, is the one that is meant; otherwise it is the step to come.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], found: Callable[[Comparison], None]) -> None:
        self._parameters = parameters
        self._found = found
        self._weights: list[int] = []  # of the step, or of the floor that waits for its step
        self._first: Gradients | None = None
        self._waiting: Gradients | None = None
        self._lenient = False  # whether the one that waits may turn out to have no task of its step
        self._open = False  # whether the last step can still get a floor
        self._recorded = False  # whether it is one to record

    def begin_step(self, recorded: bool) -> None:
        """A step begins, to be recorded or not: the floor of one that is not is dropped.

        Raises:
            UsageError: a floor was waiting that was taken at other weights.
        """
        waiting, taken_at, self._first = self._waiting, self._weights, None
        self._weights, self._open, self._recorded = self._versions(), True, recorded
        if not recorded:
            self._waiting = None
        if waiting is not None and _moved(taken_at, self._weights):
            self._waiting = None
            raise UsageError(_STALE)

    def observe(self, first: Gradients) -> None:
        """The step's gradients; compared at once if its second batch has been there."""
        if self._waiting is None:
            self._first = first
            return
        second, self._waiting, self._open = self._waiting, None, False
        if not self._lenient or set(first.tasks) & set(second.tasks):
            self._found(compare(first, second))

    def take(self, gradients: Callable[[], Gradients], *, before: bool = False) -> None:
        """A second batch, whose gradients are made if they are of use.

        `before` says that its step is yet to come. There may then be no task in common, and one that still waits is
        replaced: only a loss that is computed says whether its task is absent, and a step without losses is none.

        Raises:
            UsageError: no task is in both batches, or the step to come has a floor already.
        """
        now, first = self._versions(), self._first
        after = not before and self._open and not _moved(self._weights, now)
        if after and not self._recorded:
            return
        if after and first is not None and first.unchanged():
            self._first, self._open = None, False
            self._found(compare(first, gradients()))
            return
        if self._waiting is not None and not before:
            raise UsageError(f"This step has a floor already. {_WHERE}")
        self._waiting, self._weights, self._lenient = gradients(), now, before
        self._first, self._open = None, False

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]


def _moved(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether an optimizer has stepped: it changes most parameters, a forward at most a few (`max_norm`)."""
    return 2 * sum(a != b for a, b in zip(before, after, strict=True)) > len(after)


_WHERE = (
    "Call profiler.floor(losses_of_a_second_batch) once a step: before profiler.backward(losses), or after it and "
    "before optimizer.step(); only before it with a method that changes the gradients it gets."
)
_STALE = f"The weights have changed since profiler.floor was called, and the step it belongs to never came. {_WHERE}"
