"""A process that runs the command line, for tests that kill it or leave it no room on the disk."""

import multiprocessing
import os
import resource
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import recon
from recon_cli.main import main


def in_child(line: str, limit: int | None = None, pause: float = 0.0) -> BaseProcess:
    """Run the line in this folder, saving after every step; its output goes to child.log.

    The child is forked from a fresh interpreter, not from this one: autograd does not work in the fork of a process
    whose autograd has used threads, and another test may have done that here.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "recon_cli.main"])
    child = server.Process(target=_run, args=(line, Path.cwd(), limit, pause))
    child.start()
    return child


def _run(line: str, folder: Path, limit: int | None, pause: float) -> None:
    os.chdir(folder)
    os.environ["PAUSE"] = str(pause)
    torch.set_num_threads(int(os.environ.get("RECON_TEST_THREADS", "1")))
    recon.profile = partial(recon.profile, checkpoint_seconds=0.0)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open("child.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        code = main(line.split())
    os._exit(code)
