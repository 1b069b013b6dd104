"""Pictures of the conflicts before and after branching, and of task weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from recon.support.pictures import save_picture

_NAMED = 12  # tasks in a legend


def before_after(before: Mapping[str, float], after: Mapping[str, float], path: str | Path) -> None:
    """Draw the shares of conflicting steps (cos < 0) in the layers that stay shared, before and after branching."""
    names = [name for name in before if name in after]
    at = np.arange(len(names))
    figure = Figure(figsize=(6.5, 1.4 + 0.34 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(at - 0.2, [100 * before[n] for n in names], height=0.38, color="#b5367a", label="joint training")
    axes.barh(at + 0.2, [100 * after[n] for n in names], height=0.38, color="#4c7fb8", label="with Recon")
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of steps with conflicting gradients (cos < 0)")
    axes.set_title("Layers that stay shared", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    save_picture(figure, path)


def weights_over_steps(records: Sequence[Mapping[str, Any]], tasks: Sequence[str], path: str | Path) -> None:
    """Draw the weights that a method gave these tasks, step by step, from the lines of a `recon.Recorder`'s file."""
    figure = Figure(figsize=(6.5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(tasks)))
    for task, colour in zip(tasks, colours, strict=True):
        steps = [record for record in records if "step" in record and task in record["weights"]]
        weights = np.array([record["weights"][task] for record in steps], dtype=float)  # None becomes NaN: a gap
        axes.plot([record["step"] for record in steps], weights, color=colour, linewidth=0.8, label=task)
    axes.set_xlabel("step")
    axes.set_ylabel("weight (sum scale)")
    axes.set_title("Task weights", fontsize=10)
    if len(tasks) <= _NAMED:
        axes.legend(fontsize=8)
    save_picture(figure, path)
