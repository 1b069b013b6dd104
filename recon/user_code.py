"""Where in the user's own code an error came from."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path


def user_frame(error: BaseException, *ours: Path) -> traceback.FrameSummary | None:
    """The innermost line that is not recon's, Python's, an installed package's, or in one of the folders `ours`."""
    libraries = (Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))
    others = ("<", *(os.path.join(folder, "") for folder in (Path(__file__).parent, *libraries, *ours)))
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if not frame.filename.startswith(others)), None)


def user_line(error: BaseException) -> str:
    """`" (file:line, in function)"` of `user_frame`; empty where there is none."""
    frame = user_frame(error)
    return "" if frame is None else f" ({frame.filename}:{frame.lineno}, in {frame.name})"
