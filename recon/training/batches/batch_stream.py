"""The batches of a training: in an order that resumes after an interruption, and divided between the ranks."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from recon.errors import CheckpointError, LoaderError, ProblemError, ReconError
from recon.support.loaders import LoaderOfLoaders, every_batch_once, refuse_dict
from recon.support.network.forward import Batch, Part, batch_parts
from recon.support.processes import rank, world_size
from recon.support.random_states import (
    generator_states,
    global_states,
    keeps_its_place,
    plain,
    set_generator_states,
    set_global_states,
)
from recon.support.user_code import user_line

logger = logging.getLogger(__name__)

_END = object()
_LOOKED_AT = 64  # numbers of each tensor of a batch, to recognise the batch by


class BatchStream:
    """One epoch of a loader after the other.

    The order of an epoch's batches depends on the random states at its beginning. To get to a place within it, those
    are put back, and the batches up to there are drawn again. A loader of your own with `state_dict` and
    `load_state_dict` says and finds its place itself. `remembers` says whether `state_dict` will be asked for, so that
    the random states have to be remembered.

    Attributes:
        drawn: how many of the epoch's batches are done.
    """

    def __init__(self, loader: Iterable[Batch], remembers: bool) -> None:
        refuse_dict(loader)
        self.loader = loader
        self.remembers = remembers
        self.drawn = 0
        self._drawing = False
        # Of the batches that were drawn and are not done yet: a checksum, and the random states before each.
        self._ahead: deque[tuple[int, dict[str, Any]]] = deque()
        self._has_state = keeps_its_place(loader)
        self.begin_epoch()

    @property
    def settled(self) -> bool:
        """Whether `state_dict` can be asked for: a loader that reports its own place may be past what is done."""
        return not self._has_state or not (self._drawing or self._ahead)

    def begin_epoch(self) -> None:
        """Remember the random states from which the next epoch's batches come."""
        self.drawn = 0
        self._ahead.clear()
        self._random: dict[str, Any] = {}
        if self.remembers:
            self._random = self._random_before = self._epoch_random = global_states()
            self._generators = {} if self._has_state else generator_states(self.loader)
            self._mark = 0

    def rest(self, epoch: int) -> Iterator[Batch]:
        """The batches of the epoch that are not done yet; those that are done are drawn again right away.

        The epoch's number is for errors, which may come while the batches are iterated.
        """
        if self.drawn == 0:
            self.begin_epoch()
        return self._batches(self._iterator(epoch), epoch)

    def end_step(self) -> None:
        """The first of the batches that were drawn and are not done is done; others, drawn ahead of it, are not."""
        self.drawn += 1
        if self.remembers:
            self._mark, self._random_before = self._ahead.popleft()
            self._random = global_states()

    def state_dict(self) -> dict[str, Any]:
        """The place, as tensors and plain values."""
        return {
            "drawn": self.drawn,
            "random": plain(self._random),
            "random_before": plain(self._random_before),
            "epoch_random": plain(self._epoch_random),
            "generators": plain(self._generators),
            "mark": self._mark,
            "loader": self.loader.state_dict() if self._has_state else None,  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place where `state_dict` was called; the global random states are those of then, too."""
        self.drawn, self._mark = state["drawn"], state["mark"]
        self._random, self._random_before = state["random"], state["random_before"]
        self._epoch_random, self._generators = state["epoch_random"], state["generators"]
        if self._has_state:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        else:
            set_generator_states(self.loader, self._generators)
        set_global_states(self._random)

    def _batches(self, iterator: Iterator[Batch], epoch: int) -> Iterator[Batch]:
        for number in count(self.drawn):
            before = global_states() if self.remembers and number > self.drawn else self._random
            self._drawing = True
            batch = _next(iterator, number, epoch)
            self._drawing = False
            if batch is _END:
                return
            if self.remembers:
                self._ahead.append((_mark_of(batch), before))
            yield batch

    def _iterator(self, epoch: int) -> Iterator[Batch]:
        """Where the loader stands after the batches that are done."""
        if self.drawn and not self._has_state:
            set_global_states(self._epoch_random)
        try:
            iterator = iter(self.loader)
        except Exception as error:
            raise _loader_error(error, 0, epoch) from error
        if self.drawn and not self._has_state:
            self._draw_again(iterator, epoch)
        if self.drawn:
            set_global_states(self._random)
        return iterator

    def _draw_again(self, iterator: Iterator[Batch], epoch: int) -> None:
        batch: Any = None
        for number in range(self.drawn):
            if number == self.drawn - 1 > 0:  # the last one is the same as before, random transforms included
                set_global_states(self._random_before)
            batch = _next(iterator, number, epoch)
            if batch is _END:
                raise CheckpointError(
                    f"The loader gave {number} batches, but {self.drawn} of epoch {epoch} are done already. Resume "
                    "with the same data, or delete the checkpoint to start over."
                )
        mark = _mark_of(batch)
        if mark != self._mark and 0 not in (mark, self._mark):
            logger.warning(
                "The loader does not repeat its batches: batch %d of epoch %d is not the one that was trained on, so "
                "the result will differ from an uninterrupted training's. Draw its random numbers from the global "
                "random states, or from generators in the loader, its samplers or data; or give it state_dict() and "
                "load_state_dict().",
                self.drawn,
                epoch,
            )


class RankBatches(LoaderOfLoaders):
    """A loader's batches, each cut into equal parts, of which this rank gets its own.

    The ranks together so see the batches that one process would see; up to N - 1 samples of a batch that N does not
    divide are left out. Of a batch `{task name: (inputs, target)}`, each task's is cut. Every rank reads whole batches.

    Args:
        loader: gives the same batches on every rank.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._mine(self.loader)

    def inner_loaders(self) -> Mapping[str, Iterable[Batch]]:
        """See `LoaderOfLoaders.inner_loaders`."""
        return {"loader": self.loader}

    def once(self) -> Iterator[Batch]:
        """See `LoaderOfLoaders.once`."""
        return self._mine(every_batch_once(self.loader))

    def _mine(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            parts = [mine for part in batch_parts(batch) if (mine := _part_of_rank(part)) is not None]
            if isinstance(batch, Mapping) and parts:
                yield {task: (part.inputs, target) for part in parts for task, target in part.targets.items()}
            elif parts:
                yield parts[0].inputs, parts[0].targets


def _part_of_rank(part: Part) -> Part | None:
    """This rank's samples; None where there are fewer samples than ranks."""
    size = _batch_size(part) // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    return tree_map(lambda leaf: None if leaf is None else leaf[mine], part) if size else None


def _batch_size(part: Part) -> int:
    leaves = tree_leaves(part)
    sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves if leaf is not None}
    size = next(iter(sizes), None)
    if len(sizes) != 1 or size is None:
        raise ProblemError(
            "This problem's batches cannot be shared out over several processes: they hold more than tensors with the "
            "samples first. Profile in one process, or call recon.profile on each rank with its own loader."
        )
    return size


def batch_count(loader: object) -> int | None:
    """How many batches a loader has; None if it does not say."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set
        return None


def _next(iterator: Iterator[Batch], number: int, epoch: int) -> Any:
    try:
        return next(iterator, _END)
    except ReconError:
        raise
    except Exception as error:
        raise _loader_error(error, number, epoch) from error


def loader_error(error: Exception, asked: str) -> LoaderError:
    """The error of user code that a loader ran; `asked` says which loader, and for what."""
    # A worker process sends its whole traceback, with the error in the last line.
    lines = str(error).strip().splitlines() or [""]
    what = f"{type(error).__name__}: {lines[0]}" if len(lines) == 1 else lines[-1]
    return LoaderError(f"Your code raised {what}{user_line(error)}, asked by {asked}. Fix it, or skip that sample.")


def _loader_error(error: Exception, number: int, epoch: int) -> LoaderError:
    return loader_error(error, f"the data loader for batch {number + 1} of epoch {epoch}")


def _mark_of(batch: Batch) -> int:
    """A checksum of a few numbers of each of the batch's tensors on the CPU; 0 without any."""
    total = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided and leaf.numel():
            few = leaf.detach().flatten()[:: max(1, leaf.numel() // _LOOKED_AT)]
            total = zlib.crc32(repr(few.tolist()).encode(), total)
    return total
