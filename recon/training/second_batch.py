"""A second batch at the weights of a step, for a profiler that takes a noise floor: the loader's next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from recon.problems.losses import TaskLosses
from recon.support.network.forward import Part, fresh, to_device
from recon.support.network.layers import unwrapped
from recon.support.network.state import state_kept
from recon.support.processes import gather, world_size
from recon.support.random_states import global_states_kept, scatter_global_states
from recon.training.batches.accumulation import Update
from recon.training.batches.forward_pass import joint_losses
from recon.training.run import TrainingRun


class LookAhead(Iterator[Update]):
    """Updates, of which the next one's batches can be looked at before it is made."""

    def __init__(self, updates: Iterable[Update]) -> None:
        self._updates = iter(updates)
        self._ahead: list[Update] = []

    def __next__(self) -> Update:
        return self._ahead.pop() if self._ahead else next(self._updates)

    @property
    def ahead(self) -> bool:
        """Whether the next update was looked at: the loader is past it already."""
        return bool(self._ahead)

    def peek(self) -> Update | None:
        """The next update; None at the end."""
        if not self._ahead:
            self._ahead.extend(update for update in [next(self._updates, None)] if update is not None)
        return self._ahead[0] if self._ahead else None


def take_floor(run: TrainingRun, losses: TaskLosses, update: Update, updates: LookAhead) -> None:
    """Give the profiler a second batch before the step of `update`, if it wants one; the training is none the wiser.

    The second batch is the next one, and is trained on afterwards as if it had not been looked at. It is run on other
    random numbers than those that come next: a dropout mask that both batches shared would be no noise. Without a next
    batch, or a task in common, there is no floor, and the profiler goes on wanting one.
    """
    if run.profiler is None or not run.profiler.wants_floor():
        return
    second = updates.peek()
    everyone = gather((second is not None, _tasks(update, losses), [] if second is None else _tasks(second, losses)))
    here, there = ({task for rank in everyone for task in rank[place]} for place in (1, 2))
    if second is None or not all(rank[0] for rank in everyone) or len(here) < 2 or not here & there:
        return
    model = unwrapped(run.model)
    compared = losses.only(here & there)
    parts = [to_device(Part(fresh(part.inputs), part.targets), run.device) for part in second.parts]
    with state_kept(model), global_states_kept():
        scatter_global_states()
        passes = map(run.precision.scaled, joint_losses(model, parts, compared, run.precision))
        if len(parts) > 1:
            run.profiler.floor_of_next_step(passes)
        elif (found := next(passes, {})) or world_size() > 1:  # other ranks may have some
            run.profiler.floor_of_next_step(found)


def _tasks(update: Update, losses: TaskLosses) -> list[str]:
    present = {task for part in update.parts for task in losses.present(part)}
    return [task for task in losses.tasks if task in present]
