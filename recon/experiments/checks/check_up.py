"""check(): says in seconds, before anything is trained, what would work, what would not, and what it would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recon.branching.plan import Mode, checked_mode
from recon.errors import FanError, LoaderError, ReconError, UsageError, shortened, type_name
from recon.experiments.checks.report import CheckReport
from recon.experiments.checks.trial_branching import try_branching
from recon.experiments.costs import costs_per_sample
from recon.experiments.inputs import few_samples, make_loaders, make_model, sample_count
from recon.experiments.optimizers import make_optimizer
from recon.experiments.recipe import Recipe
from recon.problems.losses import Losses, TaskLosses, as_losses
from recon.problems.problem import Problem
from recon.profiling.findings import Preflight, message_of
from recon.profiling.preflight import look_ahead, nothing_changed
from recon.profiling.step_prices import memory_prices, step_prices
from recon.support.network.forward import Batch, Part, fresh, model_device, to_device
from recon.support.network.layers import module_at, unwrapped
from recon.training.batches.accumulation import Accumulate, check_accumulate, updates_of
from recon.training.batches.forward_pass import added_up, joint_losses
from recon.training.optimizers import as_one, check_parameters, parts_of

_NO_BATCH = (
    "The loader gave no batch. Check that its data set is not empty. (None is drawn from an iterator, which gives its "
    "batches once: pass a batch, too.)"
)
_ONLY_DENSE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam)


def check(
    model: nn.Module,
    batch: Batch | None,
    losses: Losses | TaskLosses,
    *,
    tasks: Sequence[str] | None = None,
    loader: Iterable[Batch] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    accumulate: Accumulate = 1,
    mode: Mode = "fan",
    timed: bool = True,
) -> CheckReport:
    """Say in seconds, before anything is trained, what would work, what would not, and what it would cost.

    The model runs forward and backward on the batch, and copies of it are branched. Nothing is changed: weights,
    gradients, buffers, modes, random states and the loader's place are as before.

    Args:
        model: `model(inputs) -> {task name: output}`, where it will be trained.
        batch: one batch of the training; None for the loader's first.
        losses: `{task name: (output, target) -> scalar}`, or one function of the whole batch, see `recon.train`.
        tasks: the names of the tasks, for losses that are one function.
        loader: the training's. Which tasks meet is looked up in the batch, or in the loader's first 20 if not all meet
            there.
        optimizer: the training's.
        accumulate: which batches make one step, see `recon.train`.
        mode: how the model would be branched, see `recon.convert`.
        timed: whether to measure what profiling would cost a step.

    Returns:
        The report; `print(report)` shows it, `report.ok` is True if nothing stands in the way.

    Raises:
        UsageError: there is neither a batch nor a loader, `losses` is not of at least two tasks, `model` no module, or
            there is no such mode or `accumulate`. What is wrong with any of them is not raised, but reported.
    """
    losses = _checked_losses(model, batch, losses, tasks, loader)
    checked_mode(mode)
    check_accumulate(accumulate)
    try:
        batches, found = look_ahead(model, losses, [] if batch is None else [batch], loader, accumulate)
    except LoaderError as error:
        return CheckReport(tasks=losses.tasks, mode=mode, problems=(str(error),))
    if not batches:
        return CheckReport(tasks=losses.tasks, mode=mode, problems=(_NO_BATCH,))
    return _Check(model, batches, losses, found, mode, accumulate).report(optimizer, timed)


def check_problem(
    problem: Problem, seed: int, device: torch.device, mode: Mode = "fan", accumulate: Accumulate = 1
) -> CheckReport:
    """`check` of a problem's fresh model, on the first batches of its train loader."""
    model = make_model(problem, seed).to(device)
    loader, _ = make_loaders(problem, seed, device)
    optimizer = make_optimizer(problem, model, Recipe())
    return check(model, None, problem.losses, loader=loader, optimizer=optimizer, accumulate=accumulate, mode=mode)


def _checked_losses(
    model: object, batch: object, losses: Any, tasks: Sequence[str] | None, loader: object
) -> TaskLosses:
    if not isinstance(model, nn.Module):
        raise UsageError(f"check(model, batch, losses) needs the torch.nn.Module that trains, not {type_name(model)}.")
    if batch is None and loader is None:
        raise UsageError("check needs a batch, (inputs, {task name: target}), or loader=..., whose first it draws.")
    found = as_losses(losses, tasks)
    if len(found.tasks) < 2:
        raise UsageError(
            f"losses must be {{task name: (output, target) -> scalar}}, for at least two tasks, but is a "
            f"{type_name(losses)} of {len(found.tasks)}."
        )
    return found


@dataclass
class _Check:
    """One check, from the first look to the report."""

    model: nn.Module
    batches: Sequence[Batch]
    losses: TaskLosses
    found: Preflight
    mode: Mode
    accumulate: Accumulate = 1
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self, optimizer: Any, timed: bool) -> CheckReport:
        """Look at everything else."""
        found = self.found
        self.problems += dict.fromkeys(map(message_of, found.problems))  # each task may give the same
        self.warnings += found.warnings
        self._look_at_optimizer(optimizer)
        more: dict[str, Any] = {}
        if found.layers:
            self._look_at_layers()
            more["parameters"] = sum(layer.size for layer in found.layers)
            more["shared_parameters"] = sum(layer.size for layer in found.shared)
        if found.losses and found.shared:
            parts = to_device(self._fullest(), model_device(self.model))
            with nothing_changed(self.model, self.losses):
                more |= self._try_branching(parts[0].inputs)
                more |= self._count_costs(parts[0].inputs)
                if timed and not found.problems:
                    more |= self._time_steps(parts)
        return CheckReport(
            tasks=found.tasks,
            batches=found.batches,
            gathered=found.gathered,
            all_meet=found.finished and not found.never_met,
            seen=found.seen,
            never_met=tuple(found.never_met),
            losses=found.losses,
            unused_outputs=found.unused,
            reads=found.reads,
            layers=len(found.layers),
            shared={layer.name: found.reached[layer.name] for layer in found.shared},
            strangers=tuple(found.strangers),
            frozen=tuple(found.frozen),
            unreached=tuple(found.unreached) if found.losses else (),
            mode=self.mode,
            problems=tuple(self.problems),
            warnings=tuple(self.warnings),
            **more,
        )

    def _fullest(self) -> Sequence[Part]:
        """The parts of the first step with targets of the most tasks."""
        steps = [update.parts for update in updates_of(self.batches, self.accumulate, self.losses)]
        return max(steps, key=lambda parts: len({t for part in parts for t in self.losses.present(part)}))

    def _look_at_optimizer(self, optimizer: Any) -> None:
        if optimizer is None:
            return
        try:
            together = as_one(optimizer)
            check_parameters(together, self.model)
        except UsageError as error:
            self.problems.append(str(error))
            return
        tables = [m for m in self.model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
        sparse = {table.weight for table in tables}
        for part in parts_of(together):
            own = {p for group in part.param_groups for p in group["params"] if p.requires_grad}
            refused = own & sparse if isinstance(part, _ONLY_DENSE) else own - sparse
            if refused and isinstance(part, (*_ONLY_DENSE, torch.optim.SparseAdam)):
                names = [name for name, p in self.model.named_parameters() if p in refused]
                kind = "dense" if isinstance(part, torch.optim.SparseAdam) else "sparse"
                self.problems.append(
                    f"The gradients of {shortened(names)} are {kind}, which {type(part).__name__} does not take. Give "
                    "embeddings with sparse=True to SparseAdam and everything else to another optimizer, "
                    "optimizer=[SparseAdam(tables), Adam(others)]; or make the embeddings with sparse=False."
                )

    def _look_at_layers(self) -> None:
        found = self.found
        plain = unwrapped(self.model)
        if plain is not self.model:
            self.warnings.append(
                f"The model is wrapped in {type(self.model).__name__}. It can be profiled as it is, but recon.convert "
                "needs the plain module inside; wrap what it returns."
            )
        if found.unreached and not self.problems:
            self.warnings.append(f"These layers get no gradient from any task here: {shortened(found.unreached)}.")
        shared = {layer.name: module_at(plain, layer.name) for layer in found.shared if layer.kind != "Parameter"}
        normed = [name for name, module in shared.items() if any(b.is_floating_point() for b in module.buffers())]
        if found.apart and normed:
            self.warnings.append(
                f"The running statistics of {shortened(normed)} are shared, and see the tasks' batches one after the "
                "other. If these differ much, use a norm without running statistics."
            )

    def _try_branching(self, inputs: Any) -> dict[str, Any]:
        found = self.found
        names = [layer.name for layer in found.shared]
        trial = try_branching(unwrapped(self.model), names, found.tasks, few_samples(inputs)[0], self.mode)
        if trial.refusal is None:
            return {"branched": trial.layers}
        reason = message_of(trial.refusal)
        if reason in self.problems:
            return {"refusal": reason}
        refusal = f"The model cannot be branched at all its shared layers. {reason}"
        if isinstance(trial.refusal, FanError):
            refusal += " (Tried: it works.)" if trial.per_task is None else f" (Tried: {message_of(trial.per_task)})"
        self.problems.append(refusal)
        return {"branched": trial.layers, "refusal": refusal}

    def _count_costs(self, inputs: Any) -> dict[str, Any]:
        try:
            return {"macs": costs_per_sample(self.model, fresh(inputs)).macs}
        except Exception as error:
            if not self.problems:  # what stands in the way of branching is the same
                self.problems.append(f"The forward fails in evaluation mode. {message_of(error)}")
            return {}

    def _time_steps(self, parts: Sequence[Part]) -> dict[str, Any]:
        def forward() -> dict[str, Tensor]:
            copies = [Part(fresh(part.inputs), part.targets) for part in parts]
            return added_up(list(joint_losses(self.model, copies, self.losses)))

        samples = sample_count(parts[0].inputs) if len(parts) == 1 else None
        if samples == 1:
            self.warnings.append(
                "The batch has one sample. Gradients of single samples are mostly noise, and batch norm needs two."
            )
        try:
            seconds = step_prices(self.model, forward)
        except torch.OutOfMemoryError:
            self.warnings.append(
                "A profiled step on this batch runs out of memory. Use smaller batches, or memory='sketch' (--memory "
                "sketch)."
            )
            return {}
        except ReconError as error:
            self.problems.append(f"A step cannot be profiled. {error}")
            return {}
        found = self.found
        shared = {layer.name: found.reached[layer.name] for layer in found.shared}
        return {"step_seconds": seconds, "step_bytes": memory_prices(shared, found.shared), "samples": samples}
