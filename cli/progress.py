"""What a user reads on stderr while a training runs."""

from __future__ import annotations

import sys
import time

from recon_cli.terminal import tell


def say(text: str) -> None:
    """Write one line on stderr, with the time."""
    tell(f"{time.strftime('%H:%M:%S')} {text}")


def shows_progress() -> bool:
    """Whether to show progress bars: only people read them, a log file gets one line an epoch."""
    return sys.stderr.isatty()
