"""What is said on stderr while a training goes on."""

from __future__ import annotations

import sys
import time

from recon_cli.terminal import tell


def say(text: str) -> None:
    """One line, with the time."""
    tell(f"{time.strftime('%H:%M:%S')} {text}")


def shows_progress() -> bool:
    """Progress bars are for people: a log file gets a line an epoch."""
    return sys.stderr.isatty()
