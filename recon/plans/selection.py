"""Selection: which of the shared layers to branch, and why."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from recon.branching import BranchPlan
from recon.errors import PlanError
from recon.maps import ConflictMap
from recon.maps.measures import By, check_by
from recon.plans.budget import Budget
from recon.plans.matching import Match, narrowed
from recon.plans.scoring import Scoring
from recon.support.network.layer_choice import Patterns, choose_names
from recon.support.network.layers import find_layers

Select = Literal["top", "random", "first", "last", "norms"]

SURE = 0.95  # of conflicting more than the mean layer, or more than noise

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
    layers: Patterns | None = None
    like: BranchPlan | None = None
    select: Select = "top"
    seed: int = 0
    exclude: Patterns | None = None
    units: Patterns | None = None
    by: By | None = None

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise PlanError(f"select is {self.select!r}. Choose {', '.join(map(repr, get_args(Select)))}.")
        if self.by is not None:
            check_by(self.by)
        ways = self._ways
        if len(ways) > 1 or not (ways or self.layers is not None or self.select == "norms"):
            raise PlanError(
                "Choose the layers in one way: top_k=..., share=..., max_params=... and max_macs=..., auto=True, "
                f"like=... or layers=[...]. Given: {' and '.join(ways) or 'none'}."
            )
        if self.select != "top" and (ways[:1] in (["share"], ["auto"]) or self.is_named):
            raise PlanError(
                f"select={self.select!r} works with top_k, max_params, max_macs and like, not with "
                f"{'layers alone' if self.is_named else ways[0]}."
            )
        if self.select == "top" and self.like is not None:
            raise PlanError(
                "like=... makes a control with as many parameters as that plan. Choose them by select='random', say."
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise PlanError(
                f"share is {self.share:g}. Give a share of all conflict, above 0 and at most 1, such as 0.5."
            )
        if self.units is not None and self.is_named:
            raise PlanError(
                "units=... joins layers that are chosen by score, so it goes with top_k, say. Leave it out."
            )

    @property
    def _ways(self) -> list[str]:
        budget = [f for f in ("max_params", "max_macs") if getattr(self, f) is not None]
        others = [f for f in ("top_k", "share", "like") if getattr(self, f) is not None]
        return others + ["auto"] * self.auto + ["/".join(budget)] * bool(budget)

    @property
    def is_named(self) -> bool:
        """Whether `layers` names what is branched, rather than what to choose among."""
        return self.layers is not None and not self._ways and self.select != "norms"

    @property
    def by_score(self) -> bool:
        """Whether the scores choose: not where layers are named, nor in controls that go by something else."""
        return not self.is_named and (self.select == "top" or (self.select == "norms" and bool(self._ways)))

    def by_of(self, cmap: ConflictMap) -> By:
        """What layers are scored by, in a map that has a noise floor or none."""
        return self.by or ("excess" if self.auto and cmap.has_floor else "count")

    @property
    def narrows(self) -> bool:
        """Whether fewer layers than all shared ones are there to choose among, or units of them."""
        return not self.is_named and any(option is not None for option in (self.layers, self.exclude, self.units))

    def candidates(self, found: Match) -> Match:
        """The layers to choose among, joined into units."""
        return narrowed(found, self.layers, self.exclude, self.units) if self.narrows else found

    def names(self, found: Match) -> list[str]:
        """The layers that `layers` names: shared ones by an expression, any of the model's by a list."""
        assert self.layers is not None
        if isinstance(self.layers, str):
            return choose_names(dict.fromkeys(found.matched, ()), self.layers, self.exclude)
        return without(self.layers, self.exclude)

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

    def order(self, scoring: Scoring, model: nn.Module) -> list[str]:
        """The shared layers in the order in which `select` takes them.

        Args:
            scoring: of the map of the model's layers, in model order.
            model: the unbranched model.

        Raises:
            PlanError: norms are wanted, and no shared layer is one.
        """
        layers, ranking = scoring.cmap.layers, scoring.ranking
        shared = [layer.name for layer in layers]
        if self.select == "random":
            return random.Random(self.seed).sample(shared, len(shared))
        if self.select == "norms":
            kinds = {layer.name: layer.kind.lower() for layer in find_layers(model)}
            members = {layer.name: layer.members or (layer.name,) for layer in layers}
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
        if self.is_named:
            return f"named by {self.layers!r}" if isinstance(self.layers, str) else "named"
        if self.like is not None:
            return f"{how}, within the parameters that {len(self.like.layers)} given layers add"
        if self.share is not None:
            return f"the fewest layers that hold {100 * self.share:g} % of all conflict"
        if self.budget is not None:
            return f"the most conflict within {self.budget}" if self.select == "top" else f"{how}, within {self.budget}"
        return "all norms" if self.top_k is None else how


def without(names: Sequence[str], exclude: Patterns | None) -> list[str]:
    """The names without the excluded ones; one that is named twice still is."""
    left = choose_names(dict.fromkeys(names, ()), exclude=exclude)
    return [name for name in names if name in left]


def checked_k(k: int, available: Sequence[str], what: str = "shared layers") -> int:
    """K, refused if there are not as many layers."""
    if not 1 <= k <= len(available):
        raise PlanError(
            f"top_k is {k}, but the map has {len(available)} {what}. Choose between 1 and {len(available)}."
        )
    return k


def holding_share(scoring: Scoring, share: float) -> list[str]:
    """The fewest layers that together hold at least this share of all conflict: the beginning of the ranking."""
    total, held, chosen = sum(scoring.scores.values()), 0.0, []
    for name in scoring.ranking:
        chosen.append(name)
        held += scoring.scores[name]
        if held >= share * total * (1 - 1e-12):
            return chosen
    return chosen


def sure_layers(scoring: Scoring) -> tuple[list[str], str]:
    """The layers that conflict more than the mean layer beyond the noise of the steps, and a sentence that says why.

    A layer at the mean is what a random choice of layers gets; one is chosen if it is above the mean in 95 % of
    resampled trainings (`recon.maps.noise.confidence`). More steps leave less noise, and the choice approaches all
    layers above the mean.
    """
    sure = scoring.cmap.above_mean_probability(scoring.among, scoring.by)
    mean = score_text(sum(scoring.scores.values()) / len(scoring.scores), scoring.by)
    mean += " conflicts" * (scoring.by == "count")
    rule = f"more than the mean layer ({mean}) in at least {100 * SURE:g} % of resampled trainings"
    return _those_sure(scoring, sure, rule)


def layers_above_floor(scoring: Scoring) -> tuple[list[str], str, dict[str, float]]:
    """The layers that conflict above their noise floor, a sentence that says why, and how likely each of all does.

    One is chosen if that is 95 % likely: see `ConflictMap.above_floor_probability`. What the others show may be noise.
    """
    sure = scoring.cmap.above_floor_probability(scoring.among)
    rule = f"above the noise floor with a probability of at least {100 * SURE:g} %"
    return *_those_sure(scoring, sure, rule), sure


def _those_sure(scoring: Scoring, sure: Mapping[str, float], rule: str) -> tuple[list[str], str]:
    chosen = [name for name in scoring.ranking if sure[name] >= SURE]
    if not chosen:
        raise PlanError(
            f"No layer conflicts {rule}: the ranking is within noise. Profile more steps, or choose by top_k=... or a "
            "budget."
        )
    left_out = [name for name in scoring.ranking if sure[name] < SURE]
    at_cut = [(chosen[-1], "the last is"), *[(name, "the next would be") for name in left_out[:1]]]
    cut = "; ".join(
        f"{what} {name} ({score_text(scoring.scores[name], scoring.by)}, {100 * sure[name]:.0f} %)"
        for name, what in at_cut
    )
    return chosen, f"they conflict {rule}; {cut}"


def score_text(score: float, by: By) -> str:
    """A score for a reader: a number of conflicts, or a share in per cent."""
    return f"{score:.1f}".removesuffix(".0") if by == "count" else f"{100 * score:.1f} %"
