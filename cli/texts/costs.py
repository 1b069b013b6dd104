"""What two models cost, side by side: for `recon plan` and `recon convert`."""

from __future__ import annotations

from collections.abc import Mapping

from recon.support.tables import short_number, text_table

CostsByName = Mapping[str, float | None]

_TITLES = {
    "parameters": "parameters",
    "macs": "multiply-adds, forward, per sample",
    "activation_bytes": "activation memory, training, per sample",
    "seconds_per_step": "training step, joint",
}


def with_ratios(costs: Mapping[str, CostsByName]) -> dict[str, CostsByName]:
    """The costs of two models by their names, and under `ratio` those of the second by those of the first."""
    (_, first), (_, second) = costs.items()
    return {**costs, "ratio": {what: _ratio(first[what], second[what]) for what in first}}


def cost_table(costs: Mapping[str, CostsByName]) -> str:
    """What `with_ratios` gives, as text."""
    rows = [
        [_TITLES[what], *(_text(what, costs[name][what]) for name in costs if name != "ratio"), _times(ratio)]
        for what, ratio in costs["ratio"].items()
    ]
    return text_table(["cost", *costs], rows)


def _ratio(first: float | None, second: float | None) -> float | None:
    return second / first if first and second is not None else None


def _text(what: str, value: float | None) -> str:
    if value is None:
        return "-"
    if what == "seconds_per_step":
        return f"{1000 * value:.1f} ms"
    return short_number(value) + ("B" if what == "activation_bytes" else "")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
