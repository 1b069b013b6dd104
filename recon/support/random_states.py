"""The random states that training draws from: the global ones, and those of the generators in a data loader."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from recon.support.loaders import all_inner_loaders

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def global_states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, the GPUs' included."""
    # Only if a GPU has been used: asking for a state would start all GPUs.
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in range(devices)],
    }


def set_global_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where `global_states` found them."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"]):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def global_states_kept() -> Iterator[None]:
    """Put the global generators back, whatever the block draws from them."""
    states = global_states()
    try:
        yield
    finally:
        set_global_states(states)


def scatter_global_states() -> None:
    """Take the global generators to where they will not come by themselves; repeatable from the same states."""
    seed = int(torch.randint(1 << 31, ()))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # else it would be started
        torch.cuda.manual_seed_all(seed)


def generator_states(loader: object) -> dict[str, Any]:
    """The states of the generators in a loader, its samplers and its data sets, by their path.

    Those of the loaders that it draws from and that say their place themselves, too.
    """
    return {path: _state(generator) for path, generator in _generators(loader).items()}


def set_generator_states(loader: object, states: Mapping[str, Any]) -> None:
    """Put a loader's generators where `generator_states` found them; a `KeyError` says that it has others."""
    generators = _generators(loader)
    if set(generators) != set(states):
        raise KeyError(f"the loader has the generators {sorted(generators)}, not {sorted(states)}")
    for path, generator in generators.items():
        _set_state(generator, states[path])


def keeps_its_place(loader: object) -> bool:
    """Whether a loader says and finds its place itself.

    torchdata's StatefulDataLoader finds its place, but its workers do not find their random states, and the next epoch
    is another one. It is a DataLoader, too, whose batches can be drawn again, to the last bit.
    """
    own = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return own and not isinstance(loader, DataLoader)


def plain(state: Any) -> Any:
    """A generator's state without numpy arrays, which torch.load refuses unless it is told to trust a file."""
    if isinstance(state, np.ndarray):
        return state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state


def loader_parts(loader: object) -> dict[str, object]:
    """The loader itself, and the loaders, samplers and data sets that are found in its attributes, by their path."""
    found: dict[str, object] = {}
    seen: set[int] = set()
    inner = {id(each) for each in all_inner_loaders(loader).values()}

    def look(value: object, path: str) -> None:
        members = _members(value)
        if any(isinstance(part, _PARTS) for _, part in members):
            for key, part in members:
                look(part, _inside(path, str(key)))
        elif (value is loader or id(value) in inner or isinstance(value, _PARTS)) and id(value) not in seen:
            seen.add(id(value))
            found[path] = value
            for name, attribute in _attributes(value):
                look(attribute, _inside(path, name))

    look(loader, "")
    for path, each in all_inner_loaders(loader).items():
        look(each, path)
    return found


def _members(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _generators(loader: object) -> dict[str, Any]:
    places = {path: each for path, each in all_inner_loaders(loader).items() if keeps_its_place(each)}
    return places | {
        _inside(path, name): attribute
        for path, part in loader_parts(loader).items()
        for name, attribute in _attributes(part)
        if isinstance(attribute, Generator)
    }


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_PARTS = (DataLoader, Sampler, Dataset)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    # Not a data loader's iterator: persistent workers and what they hold are out of reach.
    return ((name, attribute) for name, attribute in getattr(value, "__dict__", {}).items() if name != "_iterator")


def _state(generator: Any) -> Any:
    if keeps_its_place(generator):
        return generator.state_dict()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if keeps_its_place(generator):
        generator.load_state_dict(state)
    elif isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
