"""Profiler: counts, while a model trains, how often the tasks' gradients conflict in each shared layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor, nn

from recon.errors import CheckpointError, UsageError, shortened
from recon.maps import ConflictMap
from recon.maps.counts import threshold_bin
from recon.methods.gradients.gramians import layer_gramians
from recon.methods.gradients.jacobian import TaskJacobian, Workspace
from recon.methods.gradients.observer import Memory
from recon.methods.gradients.passes import differentiate
from recon.methods.gradients.reach import Reach
from recon.methods.gradients.sparse import add, average_gradients, entries
from recon.methods.updates.scaled_losses import LossScaleLike
from recon.methods.updates.step import backward, check_losses
from recon.profiling.counted_map import counted_map
from recon.profiling.floor import (
    Comparison,
    FloorEvery,
    FloorPairs,
    SketchedGradients,
    WholeGradients,
    floor_steps,
    second_gradients,
)
from recon.profiling.sketch import GradientSketch, sketch_gramians
from recon.profiling.stability import StableRanking
from recon.profiling.tally import Tally
from recon.support.network.layer_choice import Patterns, choose_layers
from recon.support.network.layers import find_layers, unwrapped
from recon.support.network.trainable import Model, as_module
from recon.support.processes import broadcast_answer, world_size

logger = logging.getLogger(__name__)


class Profiler:
    r"""Records S-conflict scores from the task gradients of a training run (Shi et al. 2023, definition 4).

    In your own training loop it replaces `sum(losses).backward()`:

        profiler = recon.Profiler(model)
        profiler.backward({"seg": loss_a, "depth": loss_b}); optimizer.step()
        cmap = profiler.conflict_map()

    Args:
        model: the model that trains; any layer may be shared, frozen ones take no part. It may be wrapped in
            DistributedDataParallel or compiled: the layers are named as in the model itself. Of a list of modules they
            begin with the module's number (`torch.nn.ModuleDict` gives names).
        threshold: S in (-1, 0], a multiple of 0.01. The map can be scored at other thresholds later;
            counts by task pair and stage of training are kept at this one.
        tasks: fixes the order of the tasks in the map; found as they come when not given.
        every: profile the first and then each n-th step, and train plainly in between.
        until_stable: when `is_stable` says that the ranking is settled: once the expected Jaccard overlap of the top
            layers with those of the whole run is at least this, in (0, 1].
        top_k: of how many layers; a quarter of the shared layers when not given.
        memory: `exact` holds the gradients of all T tasks for a moment, T x the shared parameters; `sketch` folds each
            into a few numbers as it is made (`recon.profiling.sketch`), which takes no more than one gradient, whatever
            T, and errs by about 0.02 in a cosine. Sketches serve joint training and other weightings of the losses.
        layers: count in these layers alone: a regular expression that matches their whole names, or a list of such
            expressions or names. The training is the same; all layers have their gradients.
        exclude: leave these out, in the same way.
        units: expressions that join layers into one, whose gradients are compared as a whole: `layer\d+\.\d+` each
            block, `lora_[AB]` the two matrices of each adapter (`recon.support.network.layer_choice.join_names`). The
            trainable layers that the other two leave are joined.
        floor: when `wants_floor` asks for a noise floor: in the first and then each n-th profiled step, n from 2 on, or
            in each 10th (`auto`).

    Raises:
        UsageError: the threshold is off the grid, `every` is below 1, `until_stable` no share, `top_k` above the number
            of layers, no such memory, or `model` is not a module or is sharded over processes; an expression is none,
            no layer is left, or a unit joins nothing or has another's name.
        UnknownNameError: an expression matches no layer.
    """

    def __init__(
        self,
        model: Model,
        threshold: float = -0.1,
        tasks: Sequence[str] = (),
        *,
        every: int = 1,
        until_stable: float | None = None,
        top_k: int | None = None,
        memory: Memory = "exact",
        layers: Patterns | None = None,
        exclude: Patterns | None = None,
        units: Patterns | None = None,
        floor: FloorEvery = None,
    ) -> None:
        threshold_bin(threshold)
        model = as_module(model)
        if not isinstance(every, int) or every < 1:
            raise UsageError(f"every is {every!r}. Profile each n-th step, n a whole number of at least 1.")
        if memory not in get_args(Memory):
            raise UsageError(f"memory is {memory!r}. Choose {' or '.join(map(repr, get_args(Memory)))}.")
        self.model = model
        self.threshold = threshold
        self.every = every
        self.memory = memory
        choice = {"layers": layers, "exclude": exclude, "units": units}
        self.layers = choose_layers(model, **choice)
        self.choice = {name: _plain(given) for name, given in choice.items() if given is not None}
        self.floor_every = floor_steps(floor)
        if top_k is not None and top_k > len(self.layers):
            whose = "choice of layers" if self.choice else "model"
            raise UsageError(f"top_k is {top_k}, but the {whose} has {len(self.layers)} layers. Choose fewer.")
        # Of all layers, counted or not: methods work on the gradients of all of them. In layer order, so that each
        # layer is one block of columns in the Jacobian.
        self.parameters = [p for layer in find_layers(unwrapped(model)) for p in layer.parameters.values()]
        self.buffers = list(model.buffers())  # finding them again takes longer than looking at them
        self.workspace = Workspace()
        self._layer_of: dict[Tensor, int] = {
            p: i for i, layer in enumerate(self.layers) for p in layer.parameters.values()
        }
        self._tasks = list(tasks)
        self._calls = 0
        self._tally: Tally | None = None
        self._shared: set[int] = set()
        self._sketch: tuple[list[int], GradientSketch] | None = None
        self._stable = None if until_stable is None else StableRanking(until_stable, top_k)
        self._floor = FloorPairs(self.parameters, self._count_floor)
        self._next_floor = 0

    @property
    def device(self) -> torch.device:
        """Where the counts are: with the first parameter."""
        return self.parameters[0].device

    @property
    def _units(self) -> dict[str, list[str]]:
        return {layer.name: list(layer.members) for layer in self.layers if layer.members}

    @property
    def steps(self) -> int:
        """How many steps were profiled."""
        return 0 if self._tally is None else self._tally.steps

    def backward(self, losses: Mapping[str, Tensor], *, loss_scale: LossScaleLike | None = None) -> None:
        """Record one step, and leave `.grad` as `sum(losses).backward()` would.

        Args:
            losses: `{task name: scalar loss}`; a task missing from the batch is left out.
            loss_scale: see `recon.backward`; cosines are the same at every scale.

        Raises:
            GradientError: a task's loss depends on no trainable parameter.
        """
        backward(losses, self.model, profiler=self, loss_scale=loss_scale)

    def floor(self, losses: Mapping[str, Tensor]) -> None:
        """Compare the step's gradients with those of a second batch at the same weights: each task with itself too.

        How often a task conflicts with itself is its noise floor, which the map carries: `ConflictMap.floor`, and
        rankings `by="excess"`. Call it every few steps, once in a step: before `backward` of the same step, or after it
        and before `optimizer.step()`. With a method that changes the gradients it is given, only before.

            if step % 8 == 0:
                profiler.floor(losses_of(second_batch))
            profiler.backward(losses_of(batch)); optimizer.step()

        `.grad` stays as it is, and the second batch's graph is freed. The forward is yours: it moves running statistics
        and draws random numbers, as a forward in training mode does. In a step that is not profiled (`every`), nothing
        is done.

        Args:
            losses: `{task name: scalar loss}` of the second batch; tasks that are not in both batches are left out.

        Raises:
            UsageError: no task is in both batches, the step has a floor already, or its losses are no scalars; when the
                next step begins, if the step that it was called for never came.
            GradientError: a task's loss depends on no trainable parameter.
        """
        self._take_floor(losses)

    def wants_floor(self) -> bool:
        """Whether a floor is due in the step to come; `recon.train` asks before each."""
        profiled = self._calls % self.every == 0
        return self.floor_every is not None and profiled and self.steps >= self._next_floor

    def floor_of_next_step(self, losses: Mapping[str, Tensor]) -> None:
        """`floor`, where the step is known to be the one to come."""
        self._take_floor(losses, before=True)

    def _take_floor(self, losses: Mapping[str, Tensor], *, before: bool = False) -> None:
        check_losses(losses)
        self._floor.take(lambda: second_gradients(losses, self, self.layers, self._layer_of), before=before)

    def begin_step(self) -> bool:
        """Whether the step that begins is one to profile."""
        recorded = self._calls % self.every == 0
        self._floor.begin_step(recorded)
        self._calls += 1
        return recorded

    @torch.no_grad()
    def observe(self, jacobian: TaskJacobian) -> None:
        """Record one step's task gradients.

        Args:
            jacobian: taken with respect to `self.parameters`, in their order.
        """
        layers, gramians = layer_gramians(jacobian, self._layer_of)
        self._count(layers, jacobian.tasks, gramians, [g for own in jacobian.own.values() for g in own.values()])
        self._floor.observe(WholeGradients.of_step(jacobian, layers, self._layer_of))

    def observe_sketched(
        self, losses: Mapping[str, Tensor], reach: Reach, weights: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Tensor]:
        """Record one step from sketches of its gradients, none of which is kept.

        Args:
            losses: `{task: scalar loss}`; their graph is freed.
            reach: of the losses.
            weights: of the tasks in the sum that is returned; 1 if not given.

        Returns:
            The weighted sum of the gradients.
        """
        layers = reach.shared_layers(self._layer_of)
        if self._sketch is None or self._sketch[0] != layers:
            self._sketch = layers, GradientSketch([list(self.layers[i].parameters.values()) for i in layers])
        sketch = self._sketch[1]
        sketches = sketch.zeros(len(reach.tasks), self.device)
        total: dict[Tensor, Tensor] = {}

        def receive(number: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if leaf in sketch:
                    sketch.fold(leaf, gradient, sketches[number])
                part = gradient if weights is None else gradient * weights[reach.tasks[number]].to(gradient)
                total[leaf] = add(total[leaf], part) if leaf in total else part.clone()

        differentiate(losses, reach, self.buffers, receive)
        if world_size() > 1:  # the same gradients, in the same order, on every rank
            reached = {p for found in reach.parameters.values() for p in found}
            mine: dict[Tensor, Tensor] = {
                p: total[p] if p in total else reach.nothing(p) for p in self.parameters if p in reached
            }
            total.update(average_gradients(mine, beside=[sketches]))
        others = [gradient for leaf, gradient in total.items() if leaf not in sketch]
        self._count(layers, reach.tasks, sketch_gramians(sketches), others)
        self._floor.observe(SketchedGradients(reach.tasks, layers, sketches))
        return total

    def is_stable(self, planned: int | None = None) -> bool:
        """Whether the ranking is settled, by `until_stable`; ask after each step, and stop when it is.

        It looks at it now and then only. All ranks get the same answer.

        Args:
            planned: how many steps the whole run would profile; twice as many as so far when not given.

        Raises:
            UsageError: the profiler was made without `until_stable`, or `top_k` is above the number of shared layers.
        """
        if self._stable is None:
            raise UsageError("is_stable() needs a goal: make the profiler with until_stable, such as until_stable=0.9.")
        if self._tally is None or not self._stable.due(self.steps):
            return False
        counts, bin_steps = self._tally.series()
        series = counts[:, sorted(self._shared)].numpy()
        stable = broadcast_answer(self._stable.check(series, self.steps, bin_steps=bin_steps, planned=planned))
        logger.info("After %d steps: %s", self.steps, self._stable)
        return stable

    def _count(self, layers: Sequence[int], tasks: Sequence[str], gramians: Tensor, others: Sequence[Tensor]) -> None:
        """Count one step, unless a gradient was not finite: one in the Gramians, or one of the others."""
        others = [numbers for gradient in others if (numbers := entries(gradient)).numel()]
        if others:
            largest = nn.utils.get_total_norm(others, norm_type=math.inf).to(gramians)
            gramians = gramians.where(largest.isfinite(), math.nan)
        if self._tally is None:
            self._tally = Tally(len(self.layers), self.threshold, self.device)
        self._shared.update(layers)
        self._tasks += [task for task in tasks if task not in self._tasks]
        self._tally.add(layers, [self._tasks.index(task) for task in tasks], gramians.to(self.device))

    def _count_floor(self, found: Comparison) -> None:
        assert self._tally is not None
        numbers = [self._tasks.index(task) for task in found.tasks]
        self._next_floor = self.steps - 1 + (self.floor_every or 0)
        self._tally.add_floor(found.layers, numbers, found.products, found.norms, found.second_norms)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for `load_state_dict` of a profiler of the same model and settings."""
        return {
            "layers": [layer.name for layer in self.layers],
            "units": self._units,
            "threshold": self.threshold,
            "every": self.every,
            "memory": self.memory,
            "floor_every": self.floor_every,
            "next_floor": self._next_floor,
            "calls": self._calls,
            "tasks": list(self._tasks),
            "shared": sorted(self._shared),
            "tally": None if self._tally is None else self._tally.state_dict(),
            "stable": None if self._stable is None else asdict(self._stable),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on recording from what `state_dict` gave.

        Raises:
            CheckpointError: the state is of a profiler with other settings.
        """
        mine: dict[str, Any] = {"threshold": self.threshold, "every": self.every, "memory": self.memory}
        mine |= {"layers": [layer.name for layer in self.layers], "units": self._units}
        mine["floor_every"] = self.floor_every
        state = {"units": {}, "floor_every": None, "next_floor": 0, **state}  # profiles from before had neither
        for name, value in mine.items():
            if name not in state:
                raise CheckpointError(f"This is not the saved state of a profiler: it has no {name}.")
            if state[name] != value:
                raise CheckpointError(
                    f"The saved profile has other {name}: {state[name]}, not {value}. Use the settings of "
                    "the interrupted run, or start over."
                )
        self._calls, self._next_floor = state["calls"], state["next_floor"]
        self._tasks = list(state["tasks"])
        self._shared = set(state["shared"])
        if self._stable is not None and state["stable"] is not None:
            self._stable.next_check = state["stable"]["next_check"]
        self._tally = None
        if state["tally"] is not None:
            self._tally = Tally(len(self.layers), self.threshold, self.device)
            self._tally.load_state_dict(state["tally"])

    def conflict_map(self, made_by: Mapping[str, Any] | None = None) -> ConflictMap:
        """What has been counted so far.

        Args:
            made_by: how the map was made, to be kept in its file.

        Raises:
            UsageError: nothing was recorded, or no layer is shared.
            GradientError: no step had finite gradients.
        """
        if self._tally is None:
            raise UsageError("Nothing was profiled yet: call profiler.backward(losses) in the training loop first.")
        shared = {number: self.layers[number] for number in sorted(self._shared)}
        if self.choice and not shared:
            names = shortened(layer.name for layer in self.layers)
            raise UsageError(
                f"None of the {len(self.layers)} layers that were chosen ({names}) is shared: in none of {self.steps} "
                "steps did the losses of two tasks depend on one of them. Choose layers of the common backbone."
            )
        return counted_map(self._tally, shared, self._tasks, {**self.choice, **(made_by or {})})


def _plain(patterns: Patterns) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)
