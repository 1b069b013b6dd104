"""A second batch at the weights of a step, for a profiler that takes a noise floor: the loader's next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from recon.problems.problem import Loss
from recon.support.network.forward import Batch, fresh, to_device, unpack
from recon.support.network.layers import unwrapped
from recon.support.network.state import state_kept
from recon.support.processes import gather
from recon.support.random_states import global_states_kept, scatter_global_states
from recon.training.run import TrainingRun
from recon.training.stepper import task_losses


class LookAhead(Iterator[Batch]):
    """Batches, of which the next can be looked at before it is taken."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._ahead: list[Batch] = []

    def __next__(self) -> Batch:
        return self._ahead.pop() if self._ahead else next(self._batches)

    @property
    def ahead(self) -> bool:
        """Whether the next batch was looked at: the loader is past it already."""
        return bool(self._ahead)

    def peek(self) -> Batch | None:
        """The next batch; None at the end."""
        if not self._ahead:
            self._ahead.extend(batch for batch in [next(self._batches, None)] if batch is not None)
        return self._ahead[0] if self._ahead else None


def take_floor(run: TrainingRun, losses: Mapping[str, Loss], batch: Batch, batches: LookAhead) -> None:
    """Give the profiler a second batch before the step of `batch`, if it wants one; the training is none the wiser.

    The second batch is the next one, and is trained on afterwards as if it had not been looked at. It is run on other
    random numbers than those that come next: a dropout mask that both batches shared would be no noise. Without a next
    batch, or a task in common, there is no floor, and the profiler goes on wanting one.
    """
    if run.profiler is None or not run.profiler.wants_floor():
        return
    second = batches.peek()
    everyone = gather((second is not None, _tasks(batch, losses), [] if second is None else _tasks(second, losses)))
    here, there = ({task for rank in everyone for task in rank[place]} for place in (1, 2))
    if second is None or not all(rank[0] for rank in everyone) or len(here) < 2 or not here & there:
        return
    model = unwrapped(run.model)
    inputs, targets = to_device(unpack(second), run.device)
    compared = {task: targets.get(task) for task in here & there}
    with state_kept(model), global_states_kept():
        scatter_global_states()
        found = task_losses(model, fresh(inputs), compared, losses, run.precision)
        run.profiler.floor_of_next_step(run.precision.scaled(found))


def _tasks(batch: Batch, losses: Mapping[str, Loss]) -> list[str]:
    _, targets = unpack(batch)
    return [task for task in losses if targets.get(task) is not None]
