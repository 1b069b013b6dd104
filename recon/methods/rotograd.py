"""RotoGrad: the gradients of the shared features, brought to one length and turned towards each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from recon.branching.modules.branch_point import leaves_behind, shared_leaves
from recon.branching.modules.rotations import Feature, Rotations, attach_rotations, by_feature
from recon.errors import NonFiniteError, UnknownNameError, UsageError, shortened
from recon.methods.bases.feature_method import FeatureMethod
from recon.methods.bases.method import WHAT_TO_LOOK_AT, check_rows
from recon.methods.gradients.jacobian import add_gradient
from recon.methods.registry import register
from recon.support.network.graph import leaves_before
from recon.support.network.layers import unwrapped
from recon.support.processes import world_size


@register(
    "rotograd",
    title="RotoGrad",
    paper="Javaloy, Valera, ICLR 2022, arXiv 2103.02631, Algorithm 1",
    scale="What lies before the shared features gets T times the mean of the tasks' directions, at one length C; the "
    "sum of the task gradients where all are equal.",
)
class RotoGrad(FeatureMethod):
    """Brings the tasks' gradients G_k at the shared features z to one length, and turns them towards each other.

    Scaling: the features get the gradient `C Σ_k G_k / ‖G_k‖`, in which `C = Σ_k α_k ‖G_k‖`, and α_k is proportional
    to `‖G_k‖ / ‖G_k⁰‖`, the length against that of the task's first step: the slower a task converges, the more its
    length counts. Heads get the gradients of their tasks as they are.

    Rotation: a head sees `R_k z`. The rotations, the leaders, follow an objective of their own: R_k maximises
    `Σ_n ⟨R_kᵀ g̃_nk, v_n⟩`, where g̃ is the gradient at `R_k z`, v the mean of the tasks' unit gradients at z, and both
    count as constants. Their optimizer (Adam) is part of the method. The network, the follower, must learn faster than
    they do in the long run, hence the decay.

    Where the features have branched already, the tasks of a group are turned towards each other.

    The rotations are part of the network: `attach` puts them into it, as its submodule `rotograd`, and `state_dict`,
    `recon.save`, `recon.load` and `recon.evaluate` take them along. In your own loop:

        method = recon.methods.get("rotograd"); method.setup(tasks); method.attach(model)

    Args:
        layer: the path of the module whose output is z. Default: the last one that all tasks' losses depend on and
            behind which they share no layer.
        size: how many features to rotate, the first ones; 0 for all, up to 512.
        lr: the rotations' learning rate.
        decay: what it is multiplied with after every step.

    Raises:
        UsageError: an option is out of range.
    """

    def __init__(self, layer: str = "", size: int = 0, lr: float = 1e-3, decay: float = 0.9999) -> None:
        super().__init__()
        if size < 0 or not 0 <= lr < math.inf or not 0 < decay <= 1:
            raise UsageError(
                "RotoGrad needs a size and an lr of at least 0 and a decay in (0, 1], but got "
                f"size={size}, lr={lr}, decay={decay}."
            )
        self.layer, self.size, self.lr, self.decay = layer, size, lr, decay
        self._initial: dict[str, Tensor] = {}
        self._optimizer: Adam | None = None
        self._optimizer_state: dict[str, Any] | None = None  # loaded before there was an optimizer
        # Not a submodule: the rotations belong to the model.
        self._attached: tuple[Rotations, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Put the rotations into a model; see `Method.attach`.

        Raises:
            UnknownNameError: the model has no such layer.
            UsageError: no `setup` yet, or the model cannot take them.
        """
        if not self.tasks:
            raise UsageError("RotoGrad needs a rotation for every task: call setup(task names) before attach(model).")
        rotations = attach_rotations(unwrapped(model), self.tasks, self.layer, self.size)
        if self._attached and self._attached[0] is not rotations:
            raise UsageError("This RotoGrad is attached to another model. Make a new one for each model.")
        self._attached = (rotations,)

    def backward(
        self, losses: Mapping[str, Tensor], model: nn.Module, loss_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See `FeatureMethod.backward`."""
        rotations = self._rotations(losses)
        features = {task: rotations.features[task] for task in losses}
        trunk, behind = _cut(losses, features, model)
        rotated = _differentiate_heads(losses, features, behind)
        gradients = {task: rotations.turn(g, task, back=True) for task, g in rotated.items()}
        norms = {task: torch.linalg.vector_norm(g, dtype=torch.float64) for task, g in gradients.items()}
        _refuse_non_finite(norms)
        if loss_scale is not None:
            norms = {task: norm / loss_scale.to(norm) for task, norm in norms.items()}
        for task, norm in norms.items():
            if task not in self._initial and norm > 0:
                self._initial[task] = norm
        weights = self._weights(norms)
        scaled = {task: weights[task].to(g) * g for task, g in gradients.items()}
        groups = _by_shared(features)
        sums = [torch.stack([scaled[task] for task in group]).sum(dim=0) for _, group in groups]
        _accumulate(trunk, torch.autograd.grad([z for z, _ in groups], trunk, sums, allow_unused=True))
        if loss_scale is not None:  # from here on, it serves the rotations alone
            gradients, rotated = ({t: g / loss_scale.to(g) for t, g in of.items()} for of in (gradients, rotated))
        units = {task: g / norms[task].to(g).clamp(min=torch.finfo(g.dtype).tiny) for task, g in gradients.items()}
        # Alone, a task has nothing to turn to: what is left is rounding errors, which Adam would make steps of.
        several = [group for _, group in groups if len(group) > 1]
        means = {task: torch.stack([units[t] for t in group]).mean(dim=0) for group in several for task in group}
        self._turn(rotations, rotated, means)
        rotations.features.clear()  # their graph is spent
        return weights

    @torch.no_grad()
    def forward(self, J: Tensor) -> Tensor:
        """The gradient that features get from these task gradients (T, P) of them, J's rows. See `Method.forward`."""
        check_rows(J)
        names = self.tasks if len(self.tasks) == len(J) else tuple(map(str, range(len(J))))
        norms = dict(zip(names, torch.linalg.vector_norm(J, dim=1, dtype=torch.float64), strict=True))
        _refuse_non_finite(norms)
        return (torch.stack(list(self._weights(norms).values())) @ J.double()).to(J)

    def get_extra_state(self) -> dict[str, Any]:
        """The lengths of the first step, and the state of the rotations' optimizer."""
        optimizer = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        return copy.deepcopy({"initial": self._initial, "optimizer": optimizer})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues with saved ones; the rotations themselves are in the model's state."""
        state = copy.deepcopy(state)
        self._initial = state["initial"]
        self._optimizer, self._optimizer_state = None, state["optimizer"]

    def _rotations(self, losses: Mapping[str, Tensor]) -> Rotations:
        if world_size() > 1:
            raise UsageError("RotoGrad trains in one process, but several train together here. Choose another method.")
        if not self._attached:
            raise UsageError(
                "RotoGrad is not attached to the model. Before the first forward pass: method.setup(task names), then "
                "method.attach(model)."
            )
        (rotations,) = self._attached
        for task in losses:
            if task not in self.tasks:
                raise UnknownNameError("task", task, self.tasks)
        if not rotations.features:
            raise UsageError(
                "No forward pass has computed gradients since the method was attached, or the features need none: "
                f"everything up to the layer {rotations.layer!r} is frozen. Run the model before each backward, and "
                "train some of what the tasks share."
            )
        return rotations

    def _weights(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`{task: C / ‖G‖}`, and zero where there is no gradient."""
        lengths = torch.stack(list(norms.values()))
        initial = torch.stack([self._initial.get(task, norm).to(norm) for task, norm in norms.items()])
        rates = torch.where(initial > 0, lengths / initial, 0.0)
        common = (rates * lengths).sum() / rates.sum() if rates.sum() > 0 else rates.sum()
        return dict(zip(norms, torch.where(lengths > 0, common / lengths, 0.0), strict=True))

    def _turn(self, rotations: Rotations, rotated: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """One step of the rotations towards their objective."""
        optimizer = self._optimizer_of(rotations)
        optimizer.zero_grad()  # of a step that a GradScaler skipped
        with torch.enable_grad():
            for task, mean in means.items():
                R = rotations.matrix(task)
                g, v = (by_feature(x)[..., : len(R)].flatten(end_dim=-2).to(R) for x in (rotated[task], mean))
                # Σ ⟨Rᵀ g, v⟩ over the samples is the inner product of R with Σ g vᵀ.
                (-(R * (g.T @ v)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()  # nothing else that reads the model's gradients must find any there
        for group in optimizer.param_groups:
            group["lr"] *= self.decay

    def _optimizer_of(self, rotations: Rotations) -> Adam:
        if self._optimizer is None:
            self._optimizer = Adam(rotations.parameters(), lr=self.lr)
            if self._optimizer_state is not None:
                self._optimizer.load_state_dict(self._optimizer_state)
        return self._optimizer


Group = tuple[Tensor, list[str]]
"""Features z, and the tasks that share them."""


def _by_shared(features: Mapping[str, Feature]) -> list[Group]:
    groups: dict[int, Group] = {}
    for task, feature in features.items():
        groups.setdefault(id(feature.shared), (feature.shared, []))[1].append(task)
    return list(groups.values())


def _cut(
    losses: Mapping[str, Tensor], features: Mapping[str, Feature], model: nn.Module
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The leaves before the features, and each task's behind them."""
    behind = leaves_behind({t: [loss] for t, loss in losses.items()}, {t: f.rotated.node for t, f in features.items()})
    trunk, _ = leaves_before([z for z, _ in _by_shared(features)], ())
    around = shared_leaves(behind) | set(trunk).intersection(*[{leaf for ls in behind.values() for leaf in ls}])
    names = [name for name, parameter in model.named_parameters() if parameter in around]
    if names:
        raise UsageError(
            "RotoGrad needs all that the tasks share to lie before the features, but their losses reach "
            f"{shortened(names)} by another way. Name the last module that they share: rotograd:layer=NAME."
        )
    return trunk, behind


def _differentiate_heads(
    losses: Mapping[str, Tensor], features: Mapping[str, Feature], behind: Mapping[str, list[Tensor]]
) -> dict[str, Tensor]:
    """`{task: gradient at its rotated features}`; what lies behind them gets its own gradient."""
    rotated: dict[str, Tensor] = {}
    for task, loss in losses.items():
        # A loss may make use of another task's output: only the last pass may free the graph.
        retain = len(rotated) + 1 < len(losses)
        inputs: list[Any] = [features[task].rotated, *behind[task]]
        rotated[task], *found = torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)
        _accumulate(behind[task], found)
    return rotated


def _accumulate(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            add_gradient(leaf, gradient.clone())


def _refuse_non_finite(norms: Mapping[str, Tensor]) -> None:
    bad = [task for task, norm in norms.items() if not norm.isfinite()]
    if bad:
        raise NonFiniteError(
            f"The gradient of task {', '.join(map(repr, bad))} at the shared features is not finite, so there is no "
            f"update that is right for all tasks. {WHAT_TO_LOOK_AT}"
        )
