"""Profiler: counts, while a model trains, how often the tasks' gradients conflict in each shared layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor

from recon.errors import UsageError
from recon.maps import ConflictMap
from recon.maps.counts import threshold_bin
from recon.methods.gradients.gramians import layer_gramians
from recon.methods.gradients.jacobian import TaskJacobian, Workspace
from recon.methods.gradients.observer import Memory
from recon.methods.gradients.passes import whole_graph
from recon.methods.gradients.reach import Reach
from recon.methods.updates.one_task_steps import FIRST
from recon.methods.updates.scaled_losses import LossScaleLike
from recon.methods.updates.step import backward, check_losses, present
from recon.profiling.batch_gradients import SketchedGradients, WholeGradients, gradients_of
from recon.profiling.conflict_counts import ConflictCounts, refuse_other_settings
from recon.profiling.floor import Comparison, FloorEvery, FloorPairs, floor_steps
from recon.profiling.sketches.sketch import GradientSketch, TaskSketches, sketch_gramians
from recon.profiling.sketches.sketched_step import sketched_step
from recon.profiling.stability import StableRanking
from recon.support.network.layer_choice import Patterns, choose_layers, given_patterns
from recon.support.network.layers import find_layers, unwrapped
from recon.support.network.trainable import Model, as_module
from recon.support.processes import broadcast_answer

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
            into a few numbers as it is made, which takes no more than one gradient, whatever T, and errs by about
            0.02 in a cosine (`recon.profiling.sketches.sketch`). Sketches serve joint training and other weightings of
            the losses.
        layers: count in these layers alone: a regular expression that matches their whole names, or a list of such
            expressions or names. The training is the same. `exclude` leaves some out, in the same way.
        units: expressions that join layers into one, whose gradients are compared as a whole: `layer\d+\.\d+` each
            block, `lora_[AB]` each adapter's two matrices (`recon.support.network.layer_choice.join_names`).
        floor: when `wants_floor` asks for a noise floor: in the first and then each n-th profiled step, n from 2 on, or
            in each 12th (`auto`).

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
        self.model, self.threshold = model, threshold
        self.every, self.memory = every, memory
        self.layers = choose_layers(model, layers, exclude, units)
        self.choice = given_patterns(layers=layers, exclude=exclude, units=units)
        self.floor_every = floor_steps(floor)
        if (top_k or 0) > len(self.layers):
            whose = "choice of layers" if self.choice else "model"
            raise UsageError(f"top_k is {top_k}, but the {whose} has {len(self.layers)} layers. Choose fewer.")
        # Of all layers, counted or not: methods work on the gradients of all of them. In layer order, so that each
        # layer is one block of columns in the Jacobian.
        self.parameters = [p for layer in find_layers(unwrapped(model)) for p in layer.parameters.values()]
        self.buffers = list(model.buffers())  # finding them again takes longer than looking at them
        self.workspace = Workspace()
        self._layer_of: dict[Tensor, int] = {p: i for i, of in enumerate(self.layers) for p in of.parameters.values()}
        self._calls = 0
        self._counts = ConflictCounts(self.layers, threshold, tasks)
        self._sketch: tuple[list[int], GradientSketch] | None = None
        self._stable = None if until_stable is None else StableRanking(until_stable, top_k)
        self._floor = FloorPairs(self.parameters, self._count_floor)
        self._next_floor = 0

    @property
    def device(self) -> torch.device:
        """Where the counts are: with the first parameter."""
        return self.parameters[0].device

    @property
    def steps(self) -> int:
        """How many steps were profiled."""
        return self._counts.steps

    @property
    def found_shared(self) -> bool:
        """Whether there was a layer on which the losses of two tasks depend."""
        return bool(self._counts.shared)

    def backward(self, losses: Mapping[str, Tensor | None], *, loss_scale: LossScaleLike | None = None) -> None:
        """Record one step, and leave `.grad` as `sum(losses).backward()` would.

        Args:
            losses: `{task name: scalar loss}`; a task missing from the batch is left out, or None.
            loss_scale: see `recon.backward`; cosines are the same at every scale.

        Raises:
            GradientError: a task's loss depends on no trainable parameter.
        """
        backward(losses, self.model, profiler=self, loss_scale=loss_scale)

    def floor(self, losses: Mapping[str, Tensor | None]) -> None:
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
        losses = present(losses)
        check_losses(losses)
        with whole_graph("These losses were differentiated already. A floor needs those of a second batch."):
            self._floor.take(lambda: gradients_of(losses, self, self.layers, self._layer_of))

    def wants_floor(self) -> bool:
        """Whether a floor is due in the step to come; `recon.train` asks before each."""
        return self.floor_every is not None and self.records_next() and self.steps >= self._next_floor

    def floor_of_next_step(self, losses: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]]) -> None:
        """`floor`, where the step is known to be the one to come: the losses of one forward, or of several in turn."""
        self._floor.take(lambda: gradients_of(losses, self, self.layers, self._layer_of), before=True)

    def records_next(self) -> bool:
        """Whether the step to come is one to profile."""
        return self._calls % self.every == 0

    def begin_step(self) -> bool:
        """Whether the step that begins is one to profile."""
        recorded = self.records_next()
        self._floor.begin_step(recorded)
        self._calls += 1
        return recorded

    @torch.no_grad()
    def observe(self, jacobian: TaskJacobian) -> None:
        """Record one step's task gradients, taken with respect to `self.parameters`, in their order."""
        layers, gramians = layer_gramians(jacobian, self._layer_of)
        others = [gradient for own in jacobian.own.values() for gradient in own.values()]
        self._counts.add(layers, jacobian.tasks, gramians, others, self.device)
        self._floor.observe(WholeGradients.of_step(jacobian, layers, self._layer_of))

    def observe_sketched(
        self, losses: Mapping[str, Tensor], reach: Reach, weights: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Tensor]:
        """Record one step from sketches of its gradients, and return their sum, by the tasks' weights if given.

        The losses' graph is freed, and no gradient is kept.
        """
        layers = reach.shared_layers(self._layer_of)
        sketch = self._sketch_of(layers)
        sketches, total = sketched_step(losses, reach, weights, sketch, self)
        others = [gradient for leaf, gradient in total.items() if leaf not in sketch]
        self._counts.add(layers, reach.tasks, sketch_gramians(sketches), others, self.device)
        self._floor.observe(SketchedGradients(reach.tasks, layers, sketches))
        return total

    def sketches_by_task(self) -> TaskSketches:
        """For the gradients of the step to come, where it goes task by task and needs no whole gradients."""
        return TaskSketches(self._sketch_of(list(range(len(self.layers)))), self.device)

    def _sketch_of(self, layers: list[int]) -> GradientSketch:
        if self._sketch is None or self._sketch[0] != layers:
            self._sketch = layers, GradientSketch([list(self.layers[i].parameters.values()) for i in layers])
        return self._sketch[1]

    def observe_by_task(self, sketches: Tensor, reach: Reach, others: Sequence[Tensor]) -> None:
        """Record a step that went task by task; `others` are gradients that no layer's sketch has."""
        layers = reach.shared_layers(self._layer_of)
        shared = sketches[:, layers]
        self._counts.add(layers, reach.tasks, sketch_gramians(shared), [*others, sketches], self.device)
        self._floor.observe(SketchedGradients(reach.tasks, layers, shared))

    def is_stable(self, planned: int | None = None) -> bool:
        """Whether the ranking is settled, by `until_stable`; ask after each step, and stop when it is.

        It looks at it now and then only. All ranks get the same answer.

        Args:
            planned: how many steps the whole run would profile; twice as many as so far when not given.

        Raises:
            UsageError: the profiler was made without `until_stable`, `top_k` is above the number of shared layers, or
                no two tasks have met in the first 20 profiled steps: the ranking would never settle.
        """
        if self._stable is None:
            raise UsageError("is_stable() needs a goal: make the profiler with until_stable, such as until_stable=0.9.")
        if self.steps >= FIRST:
            self._counts.refuse_none_met()
        if not self.found_shared or not self._stable.due(self.steps):
            return False
        series, bin_steps = self._counts.series()
        stable = broadcast_answer(self._stable.check(series, self.steps, bin_steps=bin_steps, planned=planned))
        logger.info("After %d steps: %s", self.steps, self._stable)
        return stable

    def _count_floor(self, found: Comparison) -> None:
        self._next_floor = self.steps - 1 + (self.floor_every or 0)
        self._counts.add_floor(found)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for `load_state_dict` of a profiler of the same model and settings."""
        return {
            **self._settings(),
            **self._counts.state_dict(),
            "calls": self._calls,
            "next_floor": self._next_floor,
            "stable": None if self._stable is None else asdict(self._stable),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "every": self.every,
            "memory": self.memory,
            "layers": [layer.name for layer in self.layers],
            "units": {layer.name: list(layer.members) for layer in self.layers if layer.members},
            "floor_every": self.floor_every,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on recording from what `state_dict` gave; a CheckpointError if that profiler had other settings."""
        state = {"units": {}, "floor_every": None, "next_floor": 0, **state}  # profiles from before had none of these
        refuse_other_settings(state, self._settings())
        self._calls, self._next_floor = state["calls"], state["next_floor"]
        self._counts.load_state_dict(state, self.device)
        if self._stable is not None and state["stable"] is not None:
            self._stable.next_check = state["stable"]["next_check"]

    def conflict_map(self, made_by: Mapping[str, Any] | None = None) -> ConflictMap:
        """What has been counted so far; `made_by` says how, and is kept in the map's file.

        Raises:
            UsageError: nothing was recorded, no two tasks have met in a step, or no layer is shared.
            GradientError: no step had finite gradients.
        """
        return self._counts.conflict_map({**self.choice, **(made_by or {})}, chosen=bool(self.choice))
