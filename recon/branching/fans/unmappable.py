"""Refuse operations that cannot map over a fan's groups, and say what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn

from recon.branching.fans.statement import in_forward, where
from recon.errors import FanError

# A Python number or bool read off a fan would send every group down one group's path.
_READS_VALUES = frozenset(
    "__bool__ __float__ __int__ __index__ __complex__ __contains__ __array__ __dlpack__ __reduce_ex__ "
    "item tolist numpy is_nonzero equal allclose data_ptr storage untyped_storage _typed_storage".split()
)

UNREADABLE = (
    "Values that differ between tasks (task fans) have no memory that C++ code could read. Use torch's Python "
    "operations there, or branch later layers only."
)


def refuse_unmappable(name: str) -> None:
    """Raise FanError for an operation that reads a fan's values into Python, or starts a backward pass from them."""
    if name in _READS_VALUES:
        raise FanError(
            f"{name}() reads the value of a tensor that differs between tasks{where()}: Python can follow only "
            "one of the values. Use a tensor operation (torch.where, masking), or branch later layers only."
            f"{_way_out_of_the_model()}"
        )
    if name == "backward":
        refuse_backward()


def refuse_backward() -> NoReturn:
    """Refuse a backward pass from a fan: it would add every group's gradient into one `.grad`."""
    raise FanError(
        f"backward() would add up, in all that the tasks share, gradients that differ between them{where()}. Use "
        f"torch.autograd.grad, which gives each group its own, or branch later layers only.{_way_out_of_the_model()}"
    )


def _way_out_of_the_model() -> str:
    """More advice if no model is running: the fan comes from a part of a branched model that was run alone."""
    if in_forward():
        return ""
    return " For values outside the branched model, use one task's network: recon.extract_task(branched, task)."


def refuse_past_python(func: Any) -> NoReturn:
    """Refuse an operator that C++ called on the fan itself."""
    raise FanError(
        f"C++ code called {func} on values that differ between tasks{where()}: a compiled or scripted "
        "operator cannot map over them. Use its Python form there, or branch later layers only."
    )
