"""What a map knows too little of to choose by: said in notes, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recon.branching import Partition
from recon.errors import PlanError, shortened
from recon.plans.scoring import Scoring, named
from recon.support.tables import counted

_INSTEAD = "To branch all the same, name the layers"


def check_conflict(scoring: Scoring) -> None:
    """Refuse to choose by scores that are all 0.

    Raises:
        PlanError: no pair of the tasks ever met, or no layer has a conflict.
    """
    if not scoring.of_nothing:
        return
    if scoring.compares_nothing:
        raise PlanError(
            f"No two of the tasks {shortened(scoring.tasks)} ever met in a step of the profile, so nothing is known of "
            f"their conflicts. Profile them in joint steps (recon.joint_loader). {_INSTEAD}."
        )
    between = f" between {shortened(scoring.among)}" if scoring.among else ""
    at = f" at S={scoring.cmap.threshold if scoring.threshold is None else scoring.threshold:g}"
    if scoring.by == "excess":
        raise PlanError(
            f"No layer of the map has a conflict{between} above its noise floor{at}, so there is nothing to branch. "
            f"Profile more steps. {_INSTEAD}."
        )
    raise PlanError(
        f"No layer of the map has a conflict{between}{at}, so there is nothing to branch. Score the map at a higher "
        f"threshold. {_INSTEAD}."
    )


def notes(scoring: Scoring, chosen: Sequence[str], split: Iterable[Partition], by_score: bool) -> list[str]:
    """What to know before trusting a plan, a sentence or two each.

    Args:
        scoring: what the layers were scored by.
        chosen: the layers and units that are branched, of those that the map scores.
        split: how the branched layers split the tasks.
        by_score: whether the scores chose them.
    """
    found = [_transfer(scoring), _never_met(scoring), _rarely_met(scoring), _joined(scoring, split)]
    found += [_no_floor(scoring), _no_conflict(scoring, chosen)] if by_score else []
    return [note for note in found if note]


def _transfer(scoring: Scoring) -> str:
    cmap = scoring.cmap
    if scoring.knows_pairs or not cmap.tasks or set(scoring.tasks) == set(cmap.tasks):
        return ""
    why = f"does not know {shortened(scoring.unknown)}" if scoring.unknown else "holds no counts by pair"
    return (
        f"The map {why}: the layers are scored by the conflicts of all the tasks that it was made for "
        f"({shortened(cmap.tasks)}), not of the plan's ({shortened(scoring.tasks)})."
    )


def _never_met(scoring: Scoring) -> str:
    pairs = scoring.never_met
    if not pairs:
        return ""
    return (
        f"{named(pairs)} never met in a step of the profile: nothing is known of their conflict, and they add nothing "
        "to any score. Profile them in joint steps (recon.joint_loader)."
    )


def _rarely_met(scoring: Scoring) -> str:
    pairs = scoring.cmap.rarely_met(scoring.tasks) if scoring.knows_pairs else {}
    if not pairs:
        return ""
    steps = ", ".join(f"{named([pair])} in {steps}" for pair, steps in list(pairs.items())[:6])
    more = f" and {len(pairs) - 6} more pairs" if len(pairs) > 6 else ""
    by_rate = " By rate, each step in which they met counts for more." if scoring.by == "count" else ""
    return f"Some pairs met in few of the profile's steps ({steps}{more}): their conflict is known roughly.{by_rate}"


def _joined(scoring: Scoring, split: Iterable[Partition]) -> str:
    labels = [partition.label_of for partition in dict.fromkeys(split)]
    together = [(a, b) for a, b in scoring.never_met if any(label[a] == label[b] for label in labels)]
    if not together:
        return ""
    return (
        f"The groups keep {named(together)} together, though nothing is known of their conflict: it is taken to be as "
        "frequent as that of the other pairs."
    )


def _no_floor(scoring: Scoring) -> str:
    layers = scoring.cmap.without_floor(scoring.among) if scoring.by == "excess" else {}
    if not layers:
        return ""
    pairs = dict.fromkeys(pair for found in layers.values() for pair in found)
    return (
        f"In {counted(len(layers), 'layer')} ({shortened(layers)}) the noise floor of {named(pairs)} was not measured: "
        "these pairs count as 0 there. Profile with more floor steps."
    )


def _no_conflict(scoring: Scoring, chosen: Sequence[str]) -> str:
    quiet = [name for name in chosen if not scoring.scores[name]]
    if not quiet:
        return ""
    above = " above its noise floor" if scoring.by == "excess" else ""
    return (
        f"Only {len(chosen) - len(quiet)} of the {len(chosen)} chosen layers have a conflict{above}; "
        f"{shortened(quiet)} came in by their order in the model. Choose fewer."
    )
