"""Several processes that torchrun started: how they find each other, and which of them speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recon.errors import UsageError

if TYPE_CHECKING:
    import torch

SHARED_VERBS = ("profile", "train")
"""The verbs that several processes can do together."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this is; number 0 speaks and writes."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_number() -> int:
    """Which of this machine's processes this is, and so which of its GPUs it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_verb(verb: str) -> None:
    """Refuse a verb that each process would do all over again.

    Raises:
        UsageError: see above.
    """
    if count() > 1 and verb not in SHARED_VERBS:
        raise UsageError(
            f"`recon {verb}` runs in one process, but {count()} were started. Run it without torchrun; "
            f"{' and '.join(SHARED_VERBS)} can use several."
        )


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Let the processes talk to each other in here."""
    if count() == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
