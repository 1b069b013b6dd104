"""The results that Recon's authors report, to be printed beside yours.

The figures stand in paper.json, each table with its number in the paper: Shi et al., "Recon: Reducing Conflicting
Gradients from the Root for Multi-Task Learning", ICLR 2023, arXiv 2302.11289.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

SOURCE = "arXiv 2302.11289"

DEFAULT_EDGES, DEFAULT_SEVERE = (0.0, -0.01, -0.02, -0.03), -0.01
"""The paper's bins on Multi-Fashion+MNIST, for problems that it has no table of."""

Column = tuple[str, str, float]
"""A task, a metric, and what the paper's figure is multiplied by to be in the metric's own unit."""

Key = tuple[str, str]
"""A method and a surgery, in recon's words: `("pcgrad", "Recon")`; no surgery is ""."""


@dataclass(frozen=True)
class PaperRow:
    """One row of a table: the metrics in the order of the columns, Δm in percent, and the size in MB."""

    metrics: tuple[float, ...]
    delta_m: float | None
    size: float


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables of results: its number there, its columns, and a row for each method and surgery."""

    number: int
    columns: tuple[Column, ...]
    rows: Mapping[Key, PaperRow]


@dataclass(frozen=True)
class CosineTable:
    """One of the paper's tables of the distribution of cosines over all shared parameters."""

    number: int  # in the paper
    edges: tuple[float, ...]  # the bins' lower ends but for -1, from the top; a bin holds its lower end
    severe: float  # the "reduction" is that of cosines below this
    shares: Mapping[Key, tuple[float, ...]]  # in percent, from the top bin to the lowest


def results(problem: str, backbone: str) -> PaperTable | None:
    """The paper's results on a problem with this network, if it has any."""
    return all_results().get((problem, backbone))


def cosines(problem: str, backbone: str) -> CosineTable | None:
    """The paper's distribution of cosines on a problem with this network, if it has one."""
    return all_cosines().get((problem, backbone))


@cache
def all_results() -> dict[tuple[str, str], PaperTable]:
    """Every table of results, by problem and network."""
    return {
        (table["problem"], table["backbone"]): PaperTable(
            table["table"],
            tuple((task, metric, factor) for task, metric, factor in table["columns"]),
            {key: PaperRow(tuple(row["metrics"]), row["delta_m"], row["size"]) for key, row in _rows(table)},
        )
        for table in _document()["results"]
    }


@cache
def all_cosines() -> dict[tuple[str, str], CosineTable]:
    """Every table of cosines, by problem and network."""
    return {
        (table["problem"], table["backbone"]): CosineTable(
            table["table"],
            tuple(table["edges"]),
            table["severe"],
            {key: tuple(row["shares"]) for key, row in _rows(table)},
        )
        for table in _document()["cosines"]
    }


def _rows(table: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    return (((row["method"], row["surgery"]), row) for row in table["rows"])


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(files(__package__).joinpath("paper.json").read_text(encoding="utf-8"))
    return document
