"""Several processes that torchrun started: how many there are, which one this is, and how they find each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this is; number 0 prints and writes files."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_number() -> int:
    """Which of this machine's processes this is, and so which of its GPUs it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Let the processes exchange data inside the block."""
    if count() == 1:
        yield
        return
    import torch.distributed as dist  # late: asking for the count needs no torch

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
