"""Where in the user's own code an error came from."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path


def user_line(error: BaseException) -> str:
    """`" (file:line, in function)"`: the innermost line that is not recon's, Python's or an installed package's.

    Empty where there is none.
    """
    folders = [Path(__file__).parent, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))]
    others = ("<", *(os.path.join(folder, "") for folder in folders))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f" ({frame.filename}:{frame.lineno}, in {frame.name})"
    return ""
