"""Write a recorder's lines as TensorBoard events. Imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import UsageError
from recon.support.files.whole import make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Check that TensorBoard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "Writing TensorBoard's events needs the package tensorboard. Install it: pip install tensorboard."
        )


class Events:
    """Writes scalars: `loss/TASK`, `weight/TASK` and `learning rate` by step, `test/TASK METRIC` after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._step = 0

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Write a line of a `recon.Recorder`."""
        self._step = line.get("step", self._step)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed training repeats its last steps, so the events already written for them must go.
            self._writer = SummaryWriter(str(make_folder(self.folder)), purge_step=self._step)
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, self._step)
        if "step" not in line:
            self._writer.flush()


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    if "step" not in line:
        return {f"test/{t} {name}": value for t, metrics in line["results"].items() for name, value in metrics.items()}
    losses = {f"loss/{task}": loss for task, loss in line["losses"].items()}
    weights = {f"weight/{task}": weight for task, weight in line["weights"].items()}
    return {**losses, **weights, "learning rate": line["lr"]}
