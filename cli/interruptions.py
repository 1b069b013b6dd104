"""Long trainings on the command line: what the user reads when one ends early or goes on. Imports torch."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recon.errors import CheckpointError, GradientError, ReconError, UsageError
from recon.support import launch
from recon.training.checkpoints import refuse_existing
from recon_cli.parser import command_words
from recon_cli.terminal import log_handler, tell


class TrainingStoppedError(ReconError):
    """The user stopped the training; the message says what is left of it."""


def check_resume(args: argparse.Namespace) -> None:
    """Refuse `--resume` where there can be no checkpoint: of several processes."""
    if args.resume and launch.count() > 1:
        raise UsageError("--resume goes on from a checkpoint, which several processes do not keep. Leave it out.")


@contextmanager
def resumable(
    args: argparse.Namespace, checkpoints: Sequence[Path], left: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Run trainings that have checkpoints: whatever ends one, the user is told how to go on.

    `checkpoints` has one for each training, in order; all are deleted when all are done. `left` says, as a sentence,
    what else an interruption leaves.
    """
    if not args.resume:
        for checkpoint in checkpoints:
            refuse_existing(checkpoint)
    with _resuming_on_stderr():
        try:
            yield
        except KeyboardInterrupt as error:
            raise TrainingStoppedError(f"Interrupted. {left()}{_way_on(args, checkpoints, error)}".strip()) from error
        except CheckpointError:
            raise
        except Exception as error:
            if any(checkpoint.exists() for checkpoint in checkpoints):
                tell(f"{left()}{_way_on(args, checkpoints, error)}")
            raise
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


@contextmanager
def goes_on_when_given_again(args: argparse.Namespace) -> Iterator[None]:
    """For a command whose folder keeps what was trained: a user who stops it reads how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        again = shlex.join(_command(args))
        raise TrainingStoppedError(
            f"Interrupted. {args.out} keeps what was trained. Go on with the same command:\n  {again}"
        ) from error


def _command(args: argparse.Namespace) -> list[str]:
    return ["recon", args.verb, *command_words(args)]


def _way_on(args: argparse.Namespace, checkpoints: Sequence[Path], error: BaseException) -> str:
    kept = [checkpoint for checkpoint in checkpoints if checkpoint.exists()]
    if not kept:
        return "" if launch.count() > 1 else "No step was complete, so nothing was saved."
    if isinstance(error, GradientError):  # it would happen again
        return f"{kept[-1]} keeps the training up to there. To start over with other settings, delete it."
    return f"{kept[-1]} keeps the training. Go on with:\n  {shlex.join([*_command(args), '--resume'])}"


@contextmanager
def _resuming_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("recon"), log_handler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
