"""Tell the user's code from recon's and find the user's line behind an error or a running statement."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from functools import lru_cache
from types import FrameType

_STANDARD_LIBRARY = os.path.join(sysconfig.get_path("stdlib"), "")
_INSTALLED = tuple(os.path.join(sysconfig.get_path(kind), "") for kind in ("purelib", "platlib"))


@lru_cache(maxsize=10_000)
def is_users(path: str, installed: bool) -> bool:
    """Whether the code in a file, as frames name it, is the user's: not recon's, torch's or Python's.

    With `installed`, so is what users run but did not write: recon's networks and problems, installed packages, and
    code without a file.
    """
    if path.startswith(_folder("recon")):
        return installed and path.startswith(_folder("recon", "models") + _folder("recon", "problems"))
    if path.startswith(_folder("recon_cli") + _folder("torch")):
        return False
    if path.startswith(("<", *_INSTALLED)) or "site-packages" in path:
        return installed
    return not path.startswith(_STANDARD_LIBRARY)


def _folder(package: str, *inside: str) -> tuple[str, ...]:
    # Looked up, not imported: recon must not import the command line, and most commands must not import torch.
    return tuple(os.path.join(path, *inside, "") for path in getattr(sys.modules.get(package), "__path__", ()))


def running_frame() -> FrameType | None:
    """The user's statement that is running now, also if it is in a network that somebody else wrote."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename, installed=True):
        frame = frame.f_back
    return frame


def user_frame(error: BaseException, *, installed: bool = False) -> traceback.FrameSummary | None:
    """The innermost of the user's lines that an error came through; see `is_users` for `installed`."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if is_users(frame.filename, installed)), None)


def user_line(error: BaseException) -> str:
    """`" (file:line, in function)"` of `user_frame`; empty where there is none."""
    frame = user_frame(error)
    return "" if frame is None else f" ({frame.filename}:{frame.lineno}, in {frame.name})"
