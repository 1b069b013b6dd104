"""What a gradient method is: something that combines the losses, or the gradients, of the tasks."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import NonFiniteError, UnknownNameError, UsageError

WHAT_TO_LOOK_AT = (
    "Look at that task's loss on this batch: a logarithm, root or division of zero, an empty mask, an overflow in "
    "float16, or torch.where over NaN targets, whose gradient is NaN though its value is not (choose the labelled "
    "entries before the loss: mask = ~target.isnan(); loss(output[mask], target[mask])). Or lower the learning rate."
)
"""What a gradient that is not finite comes from."""


class Method(nn.Module, ABC):
    """A way to turn the losses or gradients of several tasks into one update, in sum scale.

    Sum scale means that tasks which agree change nothing: where all T of them have the gradient g, the update
    is T·g, as it is for the sum of the losses. The entry of a method in the registry says so, or what it does
    instead.

    Attributes:
        name: what the registry calls it.
        needs_new_losses: whether `after_step` must be called.
        scale_free: whether it weighs alike when all losses of a step are multiplied by a number, another in each step.
        tasks: all task names of the run, in order; empty before `setup`.
    """

    name: str = ""
    needs_new_losses: bool = False
    scale_free: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()

    def setup(self, tasks: Sequence[str]) -> None:
        """Names all tasks of the run; called once, before the first step and before `load_state_dict`.

        The state made here lies on the CPU: move the method with `.to(device)` afterwards.

        Raises:
            UsageError: no tasks, a task named twice, or other tasks than those of an earlier call.
        """
        tasks = tuple(tasks)
        if not tasks or len(set(tasks)) < len(tasks):
            raise UsageError(f"Method {self.name!r} needs the different names of all tasks, but got {list(tasks)}.")
        if self.tasks == tasks:
            return
        if self.tasks:
            raise UsageError(
                f"Method {self.name!r} was set up for the tasks {list(self.tasks)} and cannot change to "
                f"{list(tasks)}. Make a new one with recon.methods.get({self.name!r})."
            )
        self.tasks = tasks
        self._create_state()

    def _create_state(self) -> None:
        """Makes the parameters and buffers whose size depends on `self.tasks`."""

    def settings(self) -> dict[str, Any]:
        """The options it was made with, as plain values: what must be the same where a training goes on."""
        options = {option: getattr(self, option, None) for option in inspect.signature(type(self)).parameters}
        return {o: value for o, value in options.items() if value is None or isinstance(value, (bool, int, float, str))}

    def _indices(self, tasks: Iterable[str]) -> list[int]:
        """Where these are in `tasks`."""
        tasks = list(tasks)
        for task in tasks:
            if task not in self.tasks:
                hint = "If the first batch lacked it, name all tasks before the first step: method.setup([...])."
                raise UnknownNameError("task", task, self.tasks, hint)
        return [self.tasks.index(task) for task in tasks]

    def attach(self, model: nn.Module) -> None:
        """Called once, before the first forward pass: a method that lives inside the model takes its place there."""

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Told, where `needs_new_losses`, what the step did to the losses.

        Args:
            losses: `{task: scalar loss}`, detached, of the same batch after the optimizer's step.
        """

    def end_epoch(self) -> None:
        """Called once at the end of every epoch."""

    @abstractmethod
    def forward(self, J: Tensor) -> Tensor:
        """The update for one step.

        Args:
            J: (T, P), one task gradient per row.

        Returns:
            (P,), on J's device and in its dtype.
        """


class Weighting(Method):
    """A method that weighs the losses, so that one backward pass is enough."""

    @abstractmethod
    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Combines the losses of one step.

        Args:
            losses: `{task: scalar loss}`. A task that is absent, its target missing from the batch, takes no
                part in the step and keeps its state.

        Returns:
            The scalar to call `backward` on, and `{task: weight}`: detached scalars, what each loss was
            multiplied by.

        Raises:
            UsageError: no losses, a loss that is not a scalar, an unknown task, or no `setup` yet.
        """

    @abstractmethod
    def weights(self, count: int) -> Tensor:
        """(T,) the present weights by position in `tasks`; `count` is T, for use before `setup`."""

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The sum of J's rows, weighted as the losses are at present. See `Method.forward`."""
        return self.row_weights(J) @ J

    def row_weights(self, J: Tensor) -> Tensor:
        """(T,) the present weights of J's rows, one for each of the tasks."""
        check_rows(J)
        if self.tasks and len(J) != len(self.tasks):
            raise UsageError(
                f"Method {self.name!r} needs one gradient for each of the tasks {list(self.tasks)}, "
                f"but got {len(J)} rows."
            )
        return self.weights(len(J)).to(J)

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks' names: state is stored by position, so it fits only the same tasks in the same order."""
        return {"tasks": list(self.tasks)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuses the state of other tasks."""
        if tuple(state["tasks"]) != self.tasks:
            raise UsageError(
                f"The saved state of method {self.name!r} belongs to the tasks {state['tasks']}, but the "
                f"method is set up for {list(self.tasks)}. Call setup for the same tasks, then load_state_dict."
            )

    def _stack(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The step's losses in one vector."""
        if not losses:
            raise UsageError("There is no loss to combine: every task's target was missing. Skip such a batch.")
        for task, loss in losses.items():
            if loss.ndim:
                raise UsageError(
                    f"The loss of task {task!r} must be a scalar, but has shape {tuple(loss.shape)}. "
                    "Reduce it, for example with .mean()."
                )
        return torch.stack(list(losses.values()))

    def _positions(self, losses: Mapping[str, Tensor]) -> list[int]:
        """Where the step's tasks are in `tasks`."""
        if not self.tasks:
            raise UsageError(
                f"Method {self.name!r} keeps a state per task: call setup(task names) before the first step."
            )
        return self._indices(losses)

    def _refuse(self, wrong: Tensor, positions: Sequence[int], why: str) -> None:
        """Name the tasks whose losses are wrong, if there are any."""
        names = [self.tasks[i] for i, bad in zip(positions, wrong.tolist(), strict=True) if bad]
        if names:
            raise UsageError(
                f"Method {self.name!r} {why}; those of {names} are not. Choose another weighting for them."
            )


class Aggregator(Method):
    """A method that combines the task gradients, which takes one backward pass per task.

    This class is for those that need the gradients themselves; most need only their Gramian, see
    `GramianAggregator`.

    Attributes:
        needs_losses: whether `observe_losses` must be called in every step.
    """

    needs_losses: bool = False

    def observe_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Takes note of the step's losses, where `needs_losses`, before the gradients are combined.

        Args:
            losses: `{task: scalar loss}`, detached, of the tasks that take part.
        """

    def combine(self, J: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of a step in which some tasks may be absent.

        Args:
            J: (T, P), the gradients of the tasks that took part, one per row.
            tasks: the rows' task names; all tasks when not given.

        Returns:
            (P,), and `{task: weight}`, what each gradient was multiplied by: empty for a method that has no
            such weights.

        Raises:
            NonFiniteError: a gradient is not finite; the message names the tasks at fault.
        """
        return self(J), {}

    def _positions(self, tasks: Sequence[str] | None, count: int) -> list[int]:
        """Which of all tasks the rows belong to; before `setup`, the rows are all there is."""
        if not self.tasks:
            return list(range(count))
        named = self.tasks if tasks is None else tasks
        indices = self._indices(named)
        if len(named) != count:
            raise UsageError(
                f"Method {self.name!r} needs one gradient for each of the tasks {list(named)}, but got {count} rows."
            )
        return indices

    def _check(self, J: Tensor, tasks: Sequence[str] | None) -> None:
        """Refuses what is no (T, P), and gradients that are not finite, in one pass over the memory if they are."""
        check_rows(J)
        if not J.sum(dim=1).isfinite().all() and not (finite := J.isfinite().all(dim=1)).all():
            raise NonFiniteError(non_finite((~finite).nonzero().flatten().tolist(), self._names(tasks, len(J))))

    def _names(self, tasks: Sequence[str] | None, count: int) -> Sequence[str]:
        """The rows' task names, if they are known."""
        names = self.tasks if tasks is None else tasks
        return names if len(names) == count else ()


class GramianAggregator(Aggregator):
    """An aggregator whose update is `weights(J Jᵀ) @ J`: it never sees more than T² numbers."""

    @abstractmethod
    def weights(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> Tensor:
        """What to multiply each task gradient with.

        Args:
            gramian: (T, T), the inner products of the task gradients.
            tasks: the rows' task names, for the error message.

        Returns:
            (T,), on the Gramian's device and in its dtype.

        Raises:
            NonFiniteError: the Gramian is not finite; the message names the tasks at fault.
            UsageError: not a square matrix.
        """

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The update for one step. See `Method.forward`."""
        check_rows(J)
        # Squared norms of float32 gradients leave float32 at norms of 1e-23 and 1e19.
        rows = J.double()
        return self.weights(rows @ rows.T).to(J) @ J

    def _finite(self, gramian: Tensor, tasks: Sequence[str] | None) -> Tensor:
        """The Gramian on the CPU in float64, where the solvers work; refused if it is not finite."""
        if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
            raise UsageError(f"Expected a Gramian of shape (T, T), but got {tuple(gramian.shape)}.")
        G = gramian.detach().cpu().double()
        if not G.isfinite().all():
            # One bad gradient spoils its whole row and column; only the diagonal tells whose it was.
            bad = (~G.diagonal().isfinite()).nonzero().flatten().tolist()
            bad = bad or (~G.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise NonFiniteError(non_finite(bad, self._names(tasks, len(G))))
        return G


class FeatureMethod(Method):
    """A method that works on the gradients of features which the tasks share, inside the model: `attach` it first.

    It does the whole backward pass of a step itself, which goes through what lies before the features once.
    """

    @abstractmethod
    def backward(
        self, losses: Mapping[str, Tensor], model: nn.Module, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Accumulate the update into the parameters' `.grad`.

        Args:
            losses: `{task: scalar loss}` of the latest forward pass; an absent task takes no part and keeps its state.
            model: what the method was attached to.
            loss_scale: what the losses' gradients, though not their values, were multiplied by; those that are
                accumulated stay so.

        Returns:
            `{task: weight}`: detached scalars, what the gradient of each task was multiplied by.

        Raises:
            NonFiniteError: a gradient is not finite.
            UsageError: the method is not attached, or the losses are not those of a forward pass since.
        """


def non_finite(bad: Sequence[int], tasks: Sequence[str]) -> str:
    """What to say of task gradients that are not finite.

    Args:
        bad: their rows.
        tasks: the rows' names, if they are known.
    """
    named = ", ".join(f"{i} ({tasks[i]!r})" if tasks else f"{i}" for i in bad)
    return (
        f"The gradient of task {named} is not finite, so there is no update that is right for all tasks. "
        f"{WHAT_TO_LOOK_AT}"
    )


def check_rows(J: Tensor) -> None:
    """Refuse what is not one gradient per row."""
    if J.ndim != 2 or not len(J):
        raise UsageError(f"Expected task gradients of shape (T, P), one task per row, but got {tuple(J.shape)}.")
