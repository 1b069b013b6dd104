"""The user's statement that is running now: where it is, for messages, and what it does with its result."""

from __future__ import annotations

import dis
import linecache
import os
import sys
from types import FrameType

from torch import nn

from recon.support.user_code import running_frame, user_frame

_AUGMENTED = range(13, 26)  # BINARY_OP arguments that mean `+=`, `-=` and so on, from Python 3.11 on


def where() -> str:
    """` at file.py:12, in Block.forward: y.mul_(x)`: the user's statement that is running now."""
    frame = running_frame()
    if frame is None:
        return ""
    code = frame.f_code
    owner = frame.f_locals.get("self")
    inside = f"{type(owner).__name__}.{code.co_name}" if isinstance(owner, nn.Module) else code.co_name
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f" at {os.path.basename(code.co_filename)}:{frame.f_lineno}, in {inside}" + (f": `{line}`" if line else "")


def where_raised(error: BaseException) -> str:
    """The user's statement in which an error was raised, as `where` names the one that is running."""
    frame = user_frame(error, installed=True)
    if frame is None:
        return ""
    place = f" at {os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}"
    return place + (f": `{frame.line}`" if frame.line else "")


def in_forward() -> bool:
    """Whether a module runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame is not None


def augmented_assignment() -> bool:
    """Whether the user's statement is `y += ...` or the like; only its byte code differs from `y.add_(...)`."""
    frame = running_frame()
    if frame is None or frame.f_lasti < 0:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] in _AUGMENTED)


def stored_back() -> bool:
    """Whether the user's statement is `x[i] += ...`, which also writes the result into x."""
    frame = running_frame()
    if frame is None or not augmented_assignment():
        return False
    code = frame.f_code.co_code
    later = (dis.opname[code[at]] for at in range(frame.f_lasti, len(code), 2))
    return next((name for name in later if name.startswith("STORE_")), "") in ("STORE_SUBSCR", "STORE_SLICE")
