"""Window: one joint step, task by task, for tasks that come in batches of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recon.errors import GradientError, UnknownNameError, UsageError, shortened
from recon.methods.bases.feature_method import FeatureMethod
from recon.methods.bases.method import Method
from recon.methods.bases.weighting import Weighting
from recon.methods.by_name import memoryless, method_by_name
from recon.methods.gradients.held import HeldGradients
from recon.methods.gradients.jacobian import Workspace, add_gradient
from recon.methods.gradients.observer import SketchesByTask, StepObserver
from recon.methods.gradients.passes import differentiate, whole_graph
from recon.methods.gradients.reach import LossReach, Reach, agreed, no_gradient
from recon.methods.gradients.sparse import add
from recon.methods.torchjd_adapter import wrap
from recon.methods.updates.scaled_losses import LossScaleLike
from recon.methods.updates.step import check_losses, check_profiler, update, workspace_of_next
from recon.methods.updates.weighted import adds_up, weigh
from recon.methods.weightings.gradnorm import NormWeighting
from recon.methods.weightings.joint import Joint
from recon.support.network.graph import last_uses, used_at_once
from recon.support.network.trainable import Model, as_module
from recon.support.processes import gather, world_size


class Window:
    """One joint step in a loop of your own, where each task has batches of its own.

        window = recon.Window(model, method="pcgrad", tasks=("ner", "cls"))
        for (x, tags), (z, label) in zip(ner_loader, cls_loader):
            optimizer.zero_grad()
            window.add("ner", ner_loss(model(x)["ner"], tags))
            window.add("cls", cls_loss(model(z)["cls"], label))
            window.step()
            optimizer.step()

    Each `add` runs the loss's backward pass and frees its graph; `step` gives the profiler and the method the tasks'
    gradients, as `recon.backward` does with losses of one forward. With the same samples, scores and updates are the
    same; running statistics of norms that the tasks share see the tasks' batches one after the other, as in any such
    training.

    Held until `step` are the gradients of the T tasks, T times the parameters that they share, and each task's own.
    They lie where the step wants them, so that there is no second copy, unless it is the first step and nobody has
    named the tasks (`tasks`, or `method.setup`). Joint training without a profiler, or with one that keeps sketches,
    holds the sum of the gradients alone; other weightings know their weights only once all losses are there.

    Args:
        model: as in `recon.backward`.
        method: as in `recon.backward`.
        profiler: records the steps' conflicts.
        tasks: the tasks that every step must have, on one of the ranks at least; whatever was added when not given.
        loss_scale: what every loss is multiplied by, as in `recon.backward`.

    Raises:
        UsageError: the model is none, or the method cannot work task by task, as RotoGrad, which compares what the
            tasks want of the same samples.
    """

    def __init__(
        self,
        model: Model,
        method: str | Method | None = None,
        *,
        profiler: StepObserver | None = None,
        tasks: Sequence[str] | None = None,
        loss_scale: LossScaleLike | None = None,
    ) -> None:
        tasks = () if tasks is None else tasks
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
            raise UsageError(f"tasks is {tasks!r}. Pass the tasks' names, tasks=('seg', 'depth') say.")
        self.model = as_module(model)
        self.tasks = tuple(tasks)
        self.profiler = profiler
        self.loss_scale = loss_scale
        self._by_name = method if isinstance(method, str) else None
        self._named_for = model if isinstance(model, nn.Module) else model[0]
        if isinstance(method, str):
            method = method_by_name(method, self._named_for, self.tasks) if self.tasks else memoryless(method)
        self.method = Joint() if method is None else wrap(method)
        if isinstance(self.method, FeatureMethod):
            raise UsageError(
                f"Method {self.method.name!r} compares what the tasks want of the same samples at the features, so it "
                "cannot take one task's batch after the other. Give it batches with targets of all tasks."
            )
        check_profiler(profiler, self.method)
        self._parameters = list(self.model.parameters()) if profiler is None else list(profiler.parameters)
        self._buffers = list(self.model.buffers())
        self._row_of: dict[str, int] = {}  # in the last step's Jacobian
        self.discard()

    @property
    def added(self) -> tuple[str, ...]:
        """The tasks that were added since the last step."""
        return tuple(self._values)

    def discard(self) -> None:
        """Forget what was added since the last step; `.grad` is as it was."""
        self._values: dict[str, Tensor] = {}
        self._held: dict[str, HeldGradients] = {}
        self._sum = HeldGradients()
        self._reached: dict[str, set[nn.Parameter]] = {}
        self._sketches: SketchesByTask | None = None
        self._broken = ""  # the task whose backward pass failed when a part of its gradients was in the sum

    def add(self, task: str, loss: Tensor | None, *, retain_graph: bool = False) -> None:
        """Take a task's loss: its backward pass runs now, and its graph is freed. Losses of the same task add up.

        Args:
            task: the task's name.
            loss: a scalar; None where the task is absent.
            retain_graph: keep the graph, which another task's loss of the same forward needs.

        Raises:
            GradientError: the loss depends on no trainable parameter. The window is as it was, as after all errors but
                one in the middle of a backward pass whose gradients are summed at once: it asks for `discard`.
            UsageError: the loss is no scalar, its graph was freed, or a compiled part of the model hides what it
                depends on.
            UnknownNameError: the window has no such task.
        """
        known = self.tasks or (self.method.tasks if self._by_name is None else ())
        if known and task not in known:
            raise UnknownNameError("task", task, known)
        if loss is None:
            return
        check_losses({task: loss})
        self._refuse_broken()
        if self._sums_up and self.profiler is not None and not self._values and self.profiler.records_next():
            self._sketches = self.profiler.sketches_by_task()
        found = self._differentiate(task, loss, retain_graph)
        value = loss.detach()
        if self._sums_up:
            self._sum.add(found)
        elif task in self._held:
            self._held[task].add(found)
        else:
            self._held[task] = found
        self._values[task] = self._values[task] + value if task in self._values else value

    def step(self) -> dict[str, Tensor]:
        """Close the step: the profiler records it, and the method's update is accumulated into `.grad`.

        Returns:
            `{task: weight}`, as `recon.backward`.

        Raises:
            UsageError: nothing was added, or not all of the window's tasks; what was added stays, so that the rest can
                follow.
            NonFiniteError: a gradient that the method needs is not finite.
        """
        self._refuse_broken()
        added = set().union(*gather(self.added)) if self.tasks else set()
        missing = [task for task in self.tasks if task not in added]
        if missing:
            there = [task for task in self.tasks if task in added]
            raise UsageError(
                f"The step lacks the tasks {shortened(missing)}; added are {shortened(there) or 'none'}. Call "
                "window.add(task, loss) for each task before window.step(), or leave out tasks=... if a step may lack "
                "some."
            )
        if not self._values and world_size() == 1:
            raise UsageError("Nothing was added to this step. Call window.add(task, loss) before window.step().")
        try:
            return self._step()
        finally:
            self.discard()

    def _step(self) -> dict[str, Tensor]:
        if self._sums_up:
            return self._step_of_sum()
        tasks = self._in_order()
        losses = {task: self._held[task].as_loss(self._values[task]) for task in tasks}
        if self._by_name is not None:
            self.method = method_by_name(self._by_name, self._named_for, tasks)
        self._row_of = {task: row for row, task in enumerate(tasks)}
        return update(losses, self.model, self.method, self.profiler, self.loss_scale)

    @property
    def _sums_up(self) -> bool:
        """Whether nobody needs the whole gradients of each task."""
        plain = isinstance(self.method, Weighting) and adds_up(self.method)
        whole = self.profiler is not None and self.profiler.memory == "exact"
        return plain and not whole

    def _refuse_broken(self) -> None:
        if self._broken:
            raise UsageError(
                f"The backward pass of task {self._broken!r} failed half-way, when a part of its gradients was in the "
                "step's sum already. Call window.discard(), and add the tasks of this step again."
            )

    def _step_of_sum(self) -> dict[str, Tensor]:
        total, parameters = self._sum.gradients, self._parameters
        reached = {task: self._reached[task] for task in self._in_order()}
        reach = agreed(Reach.of_tasks(reached, parameters, {}, self._tables()), parameters)
        recorded = self.profiler is not None and self.profiler.begin_step()
        # A rank without losses has begun no sketches.
        sketches = None
        if recorded and self.profiler is not None and (self._sketches or not self._values):
            sketches = (self._sketches or self.profiler.sketches_by_task()).of(reach.tasks)
        reach.average(total, parameters, beside=[] if sketches is None else [sketches])
        if self.profiler is not None and sketches is not None:
            inside = set(parameters)
            self.profiler.observe_by_task(sketches, reach, [g for leaf, g in total.items() if leaf not in inside])
        weights = weigh(self.method, self._values, reach.tasks, parameters[0].device)  # type: ignore[arg-type]
        for leaf, gradient in total.items():
            add_gradient(leaf, gradient)
        return weights

    def _in_order(self) -> list[str]:
        """The tasks that were added, in the order of the window's or the method's."""
        known = [task for task in self.tasks or self.method.tasks if task in self._values]
        return known + [task for task in self._values if task not in known]

    def _tables(self) -> set[nn.Parameter]:
        return {leaf for leaf in self._sum.tables if isinstance(leaf, nn.Parameter)}

    def _places(self, task: str, found: HeldGradients) -> Mapping[Tensor, Tensor]:
        """Where the step will want the task's gradients, if it is like the last one: no other copy of them is held."""
        workspace = workspace_of_next(self.method, self.profiler)
        if workspace is None or task in self._held:
            return {}
        if not self._row_of and len(self._held) == 1:
            self._foresee(workspace, task, found)
        return workspace.lend(self._row_of[task], found) if task in self._row_of else {}

    def _foresee(self, workspace: Workspace, task: str, found: HeldGradients) -> None:
        """Of the first step: make room for all tasks' gradients where the first two meet, and put the first's there."""
        ((first, held),) = self._held.items()
        order = self.tasks or self.method.tasks
        if not {first, task} <= set(order):
            return  # how many there will be is not known
        shared = [p for p in self._parameters if p in held.leaves and p in found.leaves and p.requires_grad]
        looked_up = held.tables & found.tables
        plain = [p for p in shared if p not in looked_up]
        workspace.matrix(plain, len(order), [p for p in shared if p in looked_up])
        self._row_of = {task: row for row, task in enumerate(order)}
        for leaf, place in workspace.lend(self._row_of[first], held).items():
            if leaf in held.gradients:
                held.keep(leaf, held.gradients[leaf], place)

    def _differentiate(self, task: str, loss: Tensor, retain_graph: bool) -> HeldGradients:
        of_loss = LossReach.of(loss)
        of_loss.refuse_hidden()
        leaves = dict.fromkeys(of_loss.leaves)
        mine = [p for p in self._parameters if p in leaves and p.requires_grad]
        if not mine:
            raise GradientError(no_gradient(task))
        inside = set(mine)
        found = HeldGradients(leaves, set(of_loss.tables))
        if isinstance(getattr(self.method, "weighting", self.method), NormWeighting):
            found.uses, found.at_once = last_uses([loss]), used_at_once([loss])

        places = {} if self._sums_up else self._places(task, found)
        received = False

        def receive(_: int, leaves: list[Tensor], gradients: list[Tensor]) -> None:
            nonlocal received
            received = True
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if self._sketches is not None:
                    self._sketches.fold(task, leaf, gradient)
                if self._sums_up and leaf in self._sum.gradients:
                    self._sum.gradients[leaf] = add(self._sum.gradients[leaf], gradient)
                else:
                    found.keep(leaf, gradient, places.get(leaf))

        outside = [leaf for leaf in leaves if leaf not in inside]
        try:
            with whole_graph(_spent(task)):
                reach = Reach({task: mine}, [], {task: outside})
                differentiate({task: loss}, reach, self._buffers, receive, retain_graph)
        except BaseException:
            self._broken = task if received and self._sums_up else ""
            raise
        self._reached[task] = self._reached.get(task, set()) | inside
        return found


def _spent(task: str) -> str:
    return (
        f"The loss of task {task!r} comes from a forward pass whose graph was freed when another loss was added. "
        "Run a forward pass for each window.add, add all but the last loss of one forward with retain_graph=True, "
        "or give all of them to recon.backward."
    )
