"""Long trainings on the command line: what is said when one ends early, or goes on. Imports torch."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recon.errors import CheckpointError, GradientError
from recon.resume import refuse_existing
from recon_cli.training import TrainingStoppedError


def checkpoint_beside(out: Path) -> Path:
    """Where the checkpoint of a training is kept whose result goes to `out`."""
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def resumable(args: argparse.Namespace, checkpoint: Path) -> Iterator[None]:
    """A training that is kept in `checkpoint`: whatever ends it, the user learns how to go on.

    Raises:
        UsageError: there is a checkpoint, and no `--resume`.
        TrainingStoppedError: the user pressed Ctrl-C.
    """
    if not args.resume:
        refuse_existing(checkpoint)
    with _resuming_on_stderr():
        try:
            yield
        except KeyboardInterrupt as error:
            nothing = "No step was complete, so nothing was saved."
            left = _way_on(args, checkpoint, error) if checkpoint.exists() else nothing
            raise TrainingStoppedError(f"Interrupted. {left}") from error
        except CheckpointError:
            raise
        except Exception as error:
            if checkpoint.exists():
                print(_way_on(args, checkpoint, error), file=sys.stderr)
            raise
    checkpoint.unlink(missing_ok=True)


def command_line(args: argparse.Namespace) -> list[str]:
    """The command that gives these arguments, without `--resume`."""
    words = ["recon", args.verb]
    for action in args.parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest == "resume":
            continue
        words += action.option_strings[-1:]
        if action.nargs != 0:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _way_on(args: argparse.Namespace, checkpoint: Path, error: BaseException) -> str:
    if isinstance(error, GradientError):  # it would come again
        return f"{checkpoint} keeps the training up to there. To start over with other settings, delete it."
    return f"{checkpoint} keeps the training. Go on with:\n  {shlex.join([*command_line(args), '--resume'])}"


@contextmanager
def _resuming_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("recon"), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
