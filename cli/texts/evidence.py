"""Scores as text, and what `--auto` says of each layer: conflict, noise or unsure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recon.support.tables import text_table

if TYPE_CHECKING:
    from recon.plans import Choice


def score_text(score: float | None, by: str) -> str:
    """A score: a number of conflicts, or a share in per cent; a dash where there is none."""
    if score is None or score != score:
        return "-"
    return f"{score:.6g}" if by == "count" else f"{100 * score:.1f}%"


def verdicts(choice: Choice) -> list[dict[str, Any]]:
    """Of every shared layer, highest score first: its score, how likely it is conflict, and the verdict."""
    from recon.plans.selection import SURE  # late: it imports torch

    return [
        {
            "name": name,
            choice.by: choice.scores[name],
            "probability": None if choice.sure[name] != choice.sure[name] else round(choice.sure[name], 3),
            "verdict": _verdict(choice.sure[name], SURE),
        }
        for name in sorted(choice.sure, key=lambda name: -choice.scores[name])
    ]


def _verdict(probability: float, sure: float) -> str:
    """Noise is what is no likelier to be conflict than not; what was not measured is neither."""
    if probability >= sure:
        return "conflict"
    return "noise" if probability <= 0.5 else "unsure"


def verdict_table(choice: Choice) -> str:
    """The same as text."""
    rows = [
        [of["name"], score_text(of[choice.by], choice.by), score_text(of["probability"], "rate"), of["verdict"]]
        for of in verdicts(choice)
    ]
    return text_table(["layer", "above its floor", "probability", "conflict or noise"], rows)
