"""CheckReport: what `recon.check` found, as plain values and as text."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from recon.errors import printable, shortened
from recon.support.tables import metric_text, short_number, text_table

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What would work with a model, its losses and its batches, what would not, and what it would cost.

    Args:
        tasks: the tasks.
        batches: how many batches were looked at; joint steps, if batches are gathered into these.
        gathered: whether they are, by `accumulate='tasks'`.
        seen: in how many of them each task has a target.
        never_met: the pairs of tasks that have no batch in common.
        all_meet: whether each two tasks have one.
        losses: of each task, on the first batch that has its target.
        unused_outputs: the entries of the model's output that are no task's.
        reads: `{task: others}`, the tasks whose output is computed from that of others.
        layers: how many the model has.
        shared: `{layer: tasks}`, the layers that two tasks or more reach, and which those are.
        strangers: the pairs of tasks that have no layer in common.
        frozen: the layers that do not train.
        unreached: the layers that do, but that no task reaches.
        mode: of branching, see `recon.convert`.
        refusal: why the model cannot be branched in this mode, with the statement; empty if it can, or was not tried.
        branched: the layers that a copy of the model was branched at without an error.
        parameters: how many scalars the model's parameters hold.
        shared_parameters: how many of these are in shared layers.
        macs: multiply-adds of a forward, for one sample.
        step_seconds: of a step's forward and backward on the batch: `plain`, and profiled with `exact` and with
            `sketch` memory; empty if not timed.
        step_bytes: of memory that a profiled step needs on top of a plain one, by the same names.
        samples: in the batch.
        problems: what stands in the way of profiling and converting.
        warnings: what does not, but should be known.
    """

    tasks: tuple[str, ...]
    batches: int = 0
    gathered: bool = False
    seen: dict[str, int] = field(default_factory=dict)
    never_met: tuple[tuple[str, str], ...] = ()
    all_meet: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    unused_outputs: tuple[str, ...] = ()
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layers: int = 0
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    strangers: tuple[tuple[str, str], ...] = ()
    frozen: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    mode: str = "fan"
    refusal: str = ""
    branched: tuple[str, ...] = ()
    parameters: int = 0
    shared_parameters: int = 0
    macs: int | None = None
    step_seconds: dict[str, float] = field(default_factory=dict)
    step_bytes: dict[str, int] = field(default_factory=dict)
    samples: int | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether profiling and converting would work."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """The report as text."""
        parts = [self._forward(), self._meetings(), self._layers(), self._branching(), self._costs(), self._steps()]
        text = [line for part in parts if part for line in [*part, ""]]
        for title, messages in (("Problems", self.problems), ("Warnings", self.warnings)):
            if messages:
                text += [f"{title}:", *(_item(message) for message in messages), ""]
        return "\n".join([*text, self._verdict()])

    def _forward(self) -> list[str]:
        if not self.losses:
            return []
        rows = [[task, metric_text(self.losses[task])] for task in self.tasks if task in self.losses]
        lines = [text_table(["task", "loss now"], rows)]
        if self.unused_outputs:
            lines.append(f"Outputs that no task uses: {shortened(self.unused_outputs, 8)}.")
        lines += [
            _wrapped(f"The output of {task} is computed from that of {' and '.join(others)}: it trains their layers.")
            for task, others in self.reads.items()
        ]
        return lines

    def _meetings(self) -> list[str]:
        if not self.all_meet:
            return []  # a problem or a warning says more
        one, several = ("joint step", "joint steps") if self.gathered else ("batch", "batches")
        which = f"the first {one}" if self.batches == 1 else f"the first {self.batches} {several}"
        always = min(self.seen.values()) == self.batches
        return [f"In {which}, all tasks meet{'' if always or self.batches == 1 else ', though not in each'}."]

    def _layers(self) -> list[str]:
        if not self.shared:
            return []
        lines = [
            f"Shared layers: {len(self.shared)} of {self.layers}, with {short_number(self.shared_parameters)} of "
            f"{short_number(self.parameters)} parameters."
        ]
        lines += [
            _wrapped(f"  {count} by {'all tasks' if tasks == self.tasks else shortened(tasks, 12)}: {names}")
            for tasks, count, names in self._by_tasks()
        ]
        if self.frozen:
            lines.append(_wrapped(f"Frozen layers: {len(self.frozen)} ({shortened(self.frozen)})."))
        return lines

    def _by_tasks(self) -> list[tuple[tuple[str, ...], int, str]]:
        """Groups of tasks, how many layers these share, and which."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, tasks in self.shared.items():
            groups.setdefault(tasks, []).append(name)
        return [(tasks, len(names), shortened(names)) for tasks, names in groups.items()]

    def _branching(self) -> list[str]:
        if not self.branched:
            return []
        count = len(self.branched)
        if self.refusal:
            return [
                _wrapped(
                    f"Branching in mode {self.mode!r} works for the last {count} of the {len(self.shared)} shared "
                    f"layers, from {self.branched[0]} on."
                )
            ]
        what = "all shared layers" if count == len(self.shared) else f"the layer {self.branched[0]}"
        return [f"Branching {what} works in mode {self.mode!r}."]

    def _costs(self) -> list[str]:
        if self.macs is None:
            return []
        return [
            f"The model: {short_number(self.parameters)} parameters, {short_number(self.macs)} multiply-adds for a "
            "sample's forward."
        ]

    def _steps(self) -> list[str]:
        if not self.step_seconds:
            return []
        plain = self.step_seconds["plain"]
        rows = [
            [
                what if what == "plain" else f"profiled, {what}",
                f"{1000 * seconds:.1f} ms",
                f"{seconds / plain:.2f}x",
                f"+{short_number(self.step_bytes[what])}B" if what in self.step_bytes else "",
            ]
            for what, seconds in self.step_seconds.items()
        ]
        on = "the batch" if self.samples is None else f"{self.samples} sample{'s' * (self.samples != 1)}"
        return [text_table([f"a step on {on}", "forward and backward", "time", "memory"], rows)]

    def _verdict(self) -> str:
        if self.ok:
            return "Profiling and converting would work."
        count = len(self.problems)
        return f"{count} problem{'s stand' if count > 1 else ' stands'} in the way of profiling and converting."


def _wrapped(text: str) -> str:
    return textwrap.fill(printable(text), _WIDTH, break_on_hyphens=False, break_long_words=False)


def _item(message: str) -> str:
    return textwrap.fill(
        printable(message),
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
