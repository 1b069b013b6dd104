"""What methods keep from step to step: their own random stream, and tensors by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recon.methods.bases.aggregator import Aggregator


class RandomStream(nn.Module):
    """A seeded random stream; the global random state is neither read nor changed.

    It lives on the CPU, wherever the gradients are, so that a state_dict continues it anywhere.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._position = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def lent(self, device: torch.device | None = None) -> Iterator[None]:
        """The global generators continue this stream inside, those of the CPU and of `device`."""
        cuda = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(self._position)
            for place in cuda:
                with torch.cuda.device(place):
                    torch.cuda.manual_seed(self._number())
            yield
            self._position = torch.get_rng_state()

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator for one step, seeded with the stream's next number."""
        with self.lent():
            seed = self._number()
        return torch.Generator(device).manual_seed(seed)

    @staticmethod
    def _number() -> int:
        return int(torch.randint(2**62, ()))

    def get_extra_state(self) -> Tensor:
        """The position in the stream."""
        return self._position

    def set_extra_state(self, state: Tensor) -> None:
        """Continues where the saved stream was."""
        self._position = state.cpu().clone()


class RemembersTasks(Aggregator):
    """An aggregator that keeps something by task; a call before `setup` is for tasks named by their positions.

    Attributes:
        memory: tensors whose first dimension is the tasks, in order. No buffers: `.to(...)` leaves their device and
            dtype alone, and they may be made in any step.
    """

    memoryless = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory: dict[str, Tensor] = {}

    def _positions(self, tasks: Sequence[str] | None, count: int) -> list[int]:
        if not self.tasks:
            self.setup([str(i) for i in range(count)] if tasks is None else tasks)
        return super()._positions(tasks, count)

    def get_extra_state(self) -> dict[str, Any]:
        """The memory, and the tasks that it belongs to."""
        return {"tasks": list(self.tasks), **self.memory}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Remembers what was saved, if it is of the same tasks."""
        self._refuse_other_tasks(state)
        # The method changes its memory in place.
        self.memory = {name: value.clone() for name, value in state.items() if name != "tasks"}
