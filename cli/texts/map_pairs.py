"""What `recon map show --pairs` prints: who fights whom, in one layer or over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recon.support.tables import text_table
from recon_cli.texts.evidence import score_text

if TYPE_CHECKING:
    from recon.maps.pair_rates import PairRates

_MATRIX = 8  # tasks: more of them are listed pair by pair


def pairs_text(found: PairRates, top: int | None = None) -> str:
    """Tasks x tasks for a few tasks; for many, the pairs, those that conflict most first."""
    lines = [_matrix(found) if len(found.tasks) <= _MATRIX else _listed(pairs_data(found), top), ""]
    lines.append("How often a pair conflicted, of the steps in which it met.")
    if found.own:
        lines.append(
            "On the diagonal, in brackets: how often a task conflicts with itself on two batches, the noise floor."
        )
    return "\n".join(lines)


def pairs_data(found: PairRates) -> list[dict[str, Any]]:
    """The pairs as plain values, those that conflict most first, those that never met last."""
    rows = [
        {
            "tasks": [a, b],
            "met": found.met[a, b],
            "rate": found.rates.get((a, b)),
            "floor": max(found.own[a], found.own[b]) if a in found.own and b in found.own else None,
        }
        for a, b in found.met
    ]
    return sorted(rows, key=lambda row: -1 if row["rate"] is None else row["rate"], reverse=True)


def _matrix(found: PairRates) -> str:
    def cell(one: str, other: str) -> str:
        if one == other:
            return f"({score_text(found.own[one], 'rate')})" if one in found.own else "-"
        pair = (one, other) if (one, other) in found.met else (other, one)
        return f"{score_text(found.rates[pair], 'rate')} of {found.met[pair]}" if pair in found.rates else "never met"

    return text_table(["", *found.tasks], [[one, *(cell(one, other) for other in found.tasks)] for one in found.tasks])


def _listed(rows: Sequence[Mapping[str, Any]], top: int | None) -> str:
    shown = rows[:top]
    header = ["task", "task", "conflicts", "met in steps", "floor"]
    cells = [
        [
            *row["tasks"],
            "never met" if row["rate"] is None else score_text(row["rate"], "rate"),
            str(row["met"]),
            score_text(row["floor"], "rate"),
        ]
        for row in shown
    ]
    left_out = len(rows) - len(shown)
    return text_table(header, cells, left=2) + (f"\n... and {left_out} more" if left_out else "")
