"""Preflight: what the first batches of a training show, and what is to be said of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from recon.branching.fans.statement import where_raised
from recon.errors import ReconError, UsageError, reason_of, shortened
from recon.methods.updates.one_task_steps import WHAT_TO_DO
from recon.support.network.layers import Layer

logger = logging.getLogger(__name__)

Pair = tuple[str, str]


@dataclass
class Preflight:
    """What the first batches show.

    Attributes:
        tasks: those that have a loss, in order.
        batches: how many were looked at; joint steps, if batches are gathered into these.
        gathered: whether they are.
        counted: whether it is known which tasks meet.
        finished: whether the look came to its end: no forward and no loss failed.
        seen: in how many of them each task has a target.
        met: in how many of them both tasks of a pair have one.
        apart: whether the tasks of a batch come with inputs of their own, and run one after the other.
        losses: of each task, in the first batch that has its target.
        unused: the entries of the model's output that are no task's.
        reads: `{task: others}`, the tasks whose output is computed from that of others.
        layers: the model's.
        reached: `{layer: tasks}`, which tasks reach each layer, in model order.
        problems: what profiling would raise.
        warnings: what it would not.
    """

    tasks: tuple[str, ...]
    batches: int = 0
    gathered: bool = False
    counted: bool = False
    finished: bool = False
    seen: dict[str, int] = field(default_factory=dict)
    met: dict[Pair, int] = field(default_factory=dict)
    apart: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    reached: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[Exception] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def shared(self) -> list[Layer]:
        """The layers that two tasks or more reach."""
        return [layer for layer in self.layers if len(self.reached.get(layer.name, ())) > 1]

    @property
    def frozen(self) -> list[str]:
        """The layers without a trainable parameter."""
        return [layer.name for layer in self.layers if not any(p.requires_grad for p in layer.parameters.values())]

    @property
    def unreached(self) -> list[str]:
        """The trainable layers that no task reaches."""
        frozen = set(self.frozen)
        return [layer.name for layer in self.layers if layer.name not in self.reached and layer.name not in frozen]

    @property
    def strangers(self) -> list[Pair]:
        """The pairs of tasks that have no layer in common."""
        together = {pair for tasks in self.reached.values() for pair in combinations(tasks, 2)}
        seen = [task for task in self.tasks if task in self.losses]
        return [pair for pair in combinations(seen, 2) if pair not in together]

    @property
    def never_met(self) -> list[Pair]:
        """The pairs of tasks that are in no batch together; none if that is not known."""
        if not self.counted:
            return []
        return [pair for pair in combinations(self.tasks, 2) if not self.met.get(pair)]

    @property
    def where(self) -> str:
        """Where the tasks were looked for, in words."""
        if self.gathered:
            return "in the joint step" if self.batches == 1 else f"in the first {self.batches} joint steps"
        return "in the batch" if self.batches == 1 else f"in the first {self.batches} batches"

    @property
    def absent(self) -> list[str]:
        """The tasks that take part in none of them."""
        return [task for task in self.tasks if task not in self.seen]

    def meet(self, tasks: Iterable[str], apart: bool) -> None:
        """Count the tasks of one step; `apart` says that they have inputs of their own."""
        here = set(tasks)
        present = [task for task in self.tasks if task in here]
        self.apart |= apart
        for task in present:
            self.seen[task] = self.seen.get(task, 0) + 1
        for pair in combinations(present, 2):
            self.met[pair] = self.met.get(pair, 0) + 1

    def judge(self, nothing: ReconError | None = None) -> None:
        """Say what the findings mean: add problems and warnings.

        Args:
            nothing: the error for tasks that are in no batch, if this was the whole epoch.
        """
        if self.counted:
            self._judge_meetings(nothing)
        if self.finished:
            self._judge_layers()

    def _judge_meetings(self, nothing: ReconError | None) -> None:
        where, absent = self.where, self.absent
        if nothing is not None:
            self.problems.append(nothing)
        elif absent:
            self.warnings.append(
                f"{where[0].upper()}{where[1:]}, {shortened(map(repr, absent))} has no target: nothing is known of it."
            )
        if not self.met and len(self.tasks) > 1:
            self.problems.append(UsageError(self.nobody_meets()))
        elif self.never_met and not absent:
            self.warnings.append(
                f"These pairs of tasks never meet {where}: {_pairs(self.never_met)}. Nothing will be known of their "
                f"conflicts. {WHAT_TO_DO}"
            )

    def _judge_layers(self) -> None:
        if not self.shared and not self.absent:
            self.problems.append(
                UsageError(
                    "No layer is shared: no two tasks' losses depend on the same trainable layer, so there is nothing "
                    "in which they could conflict. Give the tasks a common backbone, or thaw it if it is frozen."
                )
            )
        elif self.strangers:
            self.warnings.append(
                f"These pairs of tasks share no trainable layer, so they cannot conflict: {_pairs(self.strangers)}."
            )

    def choose(self, chosen: Sequence[Layer]) -> None:
        """Say so if no layer that was chosen to be counted is shared, as far as all tasks are known."""
        if not self.finished or self.absent or not self.shared:
            return
        for layer in chosen:
            members = layer.members or (layer.name,)
            if len({task for name in members for task in self.reached.get(name, ())}) > 1:
                return
        names, shared = (shortened(layer.name for layer in layers) for layers in (chosen, self.shared))
        self.problems.append(
            UsageError(
                f"None of the {len(chosen)} layers that were chosen ({names}) is shared: the losses of two tasks "
                f"depend on none of them. Choose layers of the common backbone: {shared}."
            )
        )

    def nobody_meets(self) -> str:
        """The message for tasks of which no two meet."""
        counts = ", ".join(f"{task} in {count}" for task, count in self.seen.items()) or "no task has a target"
        return (
            f"No two tasks meet {self.where} ({counts}): conflicts are those of tasks in the same step, so none could "
            f"be counted, and no method could act on any. {WHAT_TO_DO}"
        )

    def refuse(self) -> None:
        """Raise the first problem, and log the warnings, if there is none."""
        if self.problems:
            raise self.problems[0]
        for warning in self.warnings:
            logger.warning("%s", warning)


def _pairs(pairs: Sequence[Pair]) -> str:
    return shortened((f"{one} and {other}" for one, other in pairs), 6)


def message_of(error: Exception) -> str:
    """What to tell the user; of an error in the user's code, the line too."""
    if isinstance(error, ReconError):
        return str(error)
    line = where_raised(error)
    what = f"{type(error).__name__}: {reason_of(error)}{line}."
    return f"Your code raised {what}" if line else f"{what} This was not expected."
