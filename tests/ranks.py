"""Two processes of one gloo group for the tests of what several of them do together."""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = 1800  # seconds: no test waits so long, however slow the machine, but for what hangs for ever

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
)


class Ranks:
    """Two processes of one gloo group, which run a function of (rank, *args) whenever they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def run(self, check: Callable[..., None], *args: object, seconds: float = PATIENCE) -> None:
        if not self.processes:
            self._start()
        job = pickle.dumps((check, args))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        failures, waiting, deadline = [], list(self.pipes), time.monotonic() + seconds
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                failures += [f"rank {self.pipes.index(pipe)} does not answer" for pipe in waiting]
                break
            for pipe in ready:
                waiting.remove(pipe)
                if failure := pipe.recv():
                    failures.append(f"rank {self.pipes.index(pipe)}: {failure}")
                    deadline = time.monotonic() + 2  # the other one may wait for this one for ever
        if failures:
            self.stop()  # the ranks may be out of step
            pytest.fail("\n".join(failures))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def _start(self) -> None:
        spawn = mp.get_context("spawn")
        store = self.folder / f"store{time.monotonic_ns()}"
        for rank in range(WORLD):
            ours, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=_serve, args=(rank, store, theirs), daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()


def _serve(rank: int, store: Path, pipe: Any) -> None:
    torch.set_num_threads(int(os.environ.get("RECON_TEST_THREADS", "1")))
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        check, args = pickle.loads(pipe.recv_bytes())
        try:
            check(rank, *args)
            dist.barrier()
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
