"""A conflict map as a picture: where in the network, and when in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from recon.maps.counts import STAGES
from recon.maps.score_table import ScoreTable
from recon.support.pictures import save_picture
from recon.support.tables import counted


def heatmap(cmap: ScoreTable, path: str | Path, branched: Sequence[str] = ()) -> None:
    """Draw the share of conflicts at the map's own threshold, shared layers × quarters of the training, as a PNG.

    The layers in `branched` are marked as chosen for branching.
    """
    names = [layer.name for layer in cmap.layers]
    figure = Figure(figsize=(6, 1.4 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * cmap.stage_shares(), cmap="magma_r", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks(range(len(names)), [f"▸ {name}" if name in branched else name for name in names], fontsize=8)
    axes.set_xticks(range(STAGES), [f"quarter {i + 1}" for i in range(STAGES)])
    axes.set_title(f"Steps with conflicting gradients (cos < {cmap.threshold:g})", fontsize=10)
    if branched:
        axes.set_xlabel(f"▸ branched: {len(branched)} of {counted(len(names), 'shared layer')}", fontsize=8)
    figure.colorbar(image, label="% of steps and task pairs")
    save_picture(figure, path)
