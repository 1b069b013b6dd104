"""Selection: which of the shared layers to branch, and why."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from recon.branching import BranchPlan
from recon.errors import PlanError, UnknownNameError
from recon.maps import ConflictMap
from recon.plans.budget import Budget
from recon.support.network.layers import find_layers

Select = Literal["top", "random", "first", "last", "norms"]

_SURE = 0.95  # of conflicting more than the mean layer

_ORDERS = {
    "top": "by score",
    "random": "at random",
    "first": "from the first on",
    "last": "from the last back",
    "norms": "norms by score",
}


@dataclass(frozen=True)
class Selection:
    """One way to choose layers; see `recon.plan`.

    Raises:
        PlanError: none, or two that exclude each other, or a number out of range.
    """

    top_k: int | None = None
    share: float | None = None
    max_params: float | None = None
    max_macs: float | None = None
    auto: bool = False
    layers: Sequence[str] | str | None = None
    like: BranchPlan | None = None
    select: Select = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise PlanError(f"select is {self.select!r}. Choose {', '.join(map(repr, get_args(Select)))}.")
        given = self._given()
        norms_alone = self.select == "norms" and not given
        if len(given) != 1 and not norms_alone:
            raise PlanError(
                "Choose the layers in one way: top_k=..., share=..., max_params=... and max_macs=..., auto=True, "
                f"like=... or layers=[...]. Given: {' and '.join(given) or 'none'}."
            )
        if self.select != "top" and given and given[0] in ("share", "auto", "layers"):
            raise PlanError(
                f"select={self.select!r} works with top_k, max_params, max_macs and like, not with {given[0]}."
            )
        if self.select == "top" and self.like is not None:
            raise PlanError(
                "like=... makes a control with as many parameters as that plan. Choose them by select='random', say."
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise PlanError(
                f"share is {self.share:g}. Give a share of all conflict, above 0 and at most 1, such as 0.5."
            )

    def _given(self) -> list[str]:
        budget = [f for f in ("max_params", "max_macs") if getattr(self, f) is not None]
        others = [f for f in ("top_k", "share", "layers", "like") if getattr(self, f) is not None]
        return others + ["auto"] * self.auto + ["/".join(budget)] * bool(budget)

    @property
    def skips(self) -> bool:
        """Whether a layer that does not fit is passed over: not by `first` and `last`, which stay at one end."""
        return self.select not in ("first", "last")

    @property
    def budget(self) -> Budget | None:
        """What the plan may cost, where that decides.

        Raises:
            PlanError: a ratio is below 1.
        """
        limited = self.max_params is not None or self.max_macs is not None
        return Budget(self.max_params, self.max_macs) if limited else None

    def order(self, cmap: ConflictMap, model: nn.Module, threshold: float | None = None) -> list[str]:
        """The shared layers in the order in which `select` takes them.

        Args:
            cmap: the map of the model's layers, in model order.
            model: the unbranched model.
            threshold: S of the scores; the map's own when not given.

        Raises:
            PlanError: norms are wanted, and no shared layer is one.
            UsageError: the map has no scores at this threshold.
        """
        shared, ranking = [layer.name for layer in cmap.layers], cmap.ranking(threshold)
        if self.select == "random":
            return random.Random(self.seed).sample(shared, len(shared))
        if self.select == "norms":
            kinds = {layer.name: layer.kind.lower() for layer in find_layers(model)}
            members = {layer.name: layer.members or (layer.name,) for layer in cmap.layers}
            norms = [name for name in ranking if all("norm" in kinds[member] for member in members[name])]
            if not norms:
                raise PlanError(
                    "select='norms' finds no norm among the shared layers, going by the names of their classes."
                )
            return norms
        return {"top": ranking, "first": shared, "last": shared[::-1]}[self.select]

    def describe(self) -> str:
        """How the layers are chosen, in a few words: "4 layers: ..."; of `auto`, `sure_layers` says more."""
        how = _ORDERS[self.select] + (f" (seed {self.seed})" if self.select == "random" else "")
        if self.layers is not None:
            return f"named by {self.layers!r}" if isinstance(self.layers, str) else "named"
        if self.like is not None:
            return f"{how}, within the parameters that {len(self.like.layers)} given layers add"
        if self.share is not None:
            return f"the fewest layers that hold {100 * self.share:g} % of all conflict"
        if self.budget is not None:
            return f"the most conflict within {self.budget}" if self.select == "top" else f"{how}, within {self.budget}"
        return "all norms" if self.top_k is None else how


def checked_k(k: int, available: Sequence[str], what: str = "shared layers") -> int:
    """K, refused if there are not as many layers."""
    if not 1 <= k <= len(available):
        raise PlanError(
            f"top_k is {k}, but the map has {len(available)} {what}. Choose between 1 and {len(available)}."
        )
    return k


def holding_share(cmap: ConflictMap, share: float, threshold: float | None = None) -> list[str]:
    """The fewest layers that together hold at least this share of all conflict: the beginning of the ranking."""
    scores = cmap.scores(threshold)
    total, held, chosen = sum(scores.values()), 0, []
    if not total:
        raise PlanError(
            "No layer of the map has a conflict, so none has a share of it. Score the map at a higher threshold."
        )
    for name in cmap.ranking(threshold):
        chosen.append(name)
        held += scores[name]
        if held >= share * total * (1 - 1e-12):
            return chosen
    return chosen


def sure_layers(cmap: ConflictMap) -> tuple[list[str], str]:
    """The layers that conflict more than the mean layer beyond the noise of the steps, and a sentence that says why.

    A layer at the mean is what a random choice of layers gets; one is chosen if it is above the mean in 95 % of
    resampled trainings (`recon.maps.confidence`). More steps leave less noise, and the choice approaches all layers
    above the mean.
    """
    sure = cmap.above_mean_probability()
    scores = cmap.scores()
    chosen = [name for name in cmap.ranking() if sure[name] >= _SURE]
    mean = sum(scores.values()) / len(scores)
    rule = f"more than the mean layer ({mean:.1f} conflicts) in at least {100 * _SURE:g} % of resampled trainings"
    if not chosen:
        raise PlanError(
            f"No layer conflicts {rule}: the ranking is within noise. Profile more steps, or choose by top_k=... or a "
            "budget."
        )
    left_out = [name for name in cmap.ranking() if sure[name] < _SURE]
    at_cut = [(chosen[-1], "the last is"), *[(name, "the next would be") for name in left_out[:1]]]
    cut = "; ".join(f"{what} {name} ({scores[name]}, {100 * sure[name]:.0f} %)" for name, what in at_cut)
    return chosen, f"they conflict {rule}; {cut}"


def names_matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a regular expression matches as a whole."""
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise PlanError(
            f"layers={pattern!r} is not a regular expression: {error}. Correct it, or pass a list of names."
        ) from error
    if not found:
        hint = "A pattern must match the whole name of a shared layer, as in '.*bn1'."
        raise UnknownNameError("shared layer", pattern, names, hint)
    return found
