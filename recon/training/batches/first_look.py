"""Look at a loader's first batches before a training, which must not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from recon.support.loaders import all_inner_loaders
from recon.support.network.forward import Batch
from recon.support.network.state import refill
from recon.support.random_states import (
    generator_states,
    global_states_kept,
    keeps_its_place,
    loader_parts,
    set_generator_states,
)
from recon.training.batches.batch_stream import BatchStream


def first_batches(loader: Iterable[Batch], count: int) -> list[Batch] | None:
    """The first batches of the loader's next pass, at most `count`, as it gives them.

    The loader then gives the same batches again, to the last bit: the global random states, those of the generators in
    the loader, its samplers and data sets, and their attributes are put back. A DataLoader's workers are started for
    the look, and ended; those that persist from an earlier pass have random states of their own, and are not asked.

    Returns:
        None for an iterator, or a loader that draws from one: it cannot give a batch twice.

    Raises:
        LoaderError: the loader raised.
    """
    if any(isinstance(each, Iterator) for each in (loader, *all_inner_loaders(loader).values())):
        return None
    with global_states_kept(), _loader_kept(loader):
        stream, batches = BatchStream(loader, remembers=False), []
        for batch in islice(stream.rest(epoch=1), count):
            batches.append(batch)
            stream.end_step()
        return batches


@contextmanager
def _loader_kept(loader: Any) -> Iterator[None]:
    """Put back what drawing batches changes in a loader."""
    generators = generator_states(loader)
    own = keeps_its_place(loader)
    place = loader.state_dict() if own else None
    parts = [_KeptPart(part) for part in loader_parts(loader).values()]
    try:
        yield
    finally:
        for part in parts:
            part.put_back()
        set_generator_states(loader, generators)
        if own:
            loader.load_state_dict(place)


class _KeptPart:
    """What the attributes of a loader, a sampler or a data set are: an own loader may count its epochs, say."""

    def __init__(self, part: object) -> None:
        self.attributes: dict[str, Any] = getattr(part, "__dict__", {})
        self.before = dict(self.attributes)
        self.contents = [(v, copy.copy(v)) for v in self.before.values() if isinstance(v, (list, dict, set))]
        if isinstance(part, DataLoader):  # persistent workers, of an earlier epoch say, have states of their own
            self.attributes["_iterator"] = None

    def put_back(self) -> None:
        self.attributes.clear()
        self.attributes.update(self.before)
        for container, content in self.contents:
            refill(container, content)
