"""What cannot map over the groups of a fan, whatever the statement: how recon says so."""

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
    "Values that differ between tasks (task fans) have no memory that code past Python could read. Use torch's "
    "Python operations there, or branch later layers only."
)


def refuse_unmappable(name: str) -> None:
    """Fail on an operation that reads a fan's values into Python, or starts a backward pass from them."""
    if name in _READS_VALUES:
        raise FanError(
            f"{name}() reads the value of a tensor that differs between tasks{where()}: Python can follow only "
            "one of the values. Use a tensor operation (torch.where, masking), or branch later layers only."
            f"{_way_out_of_the_model()}"
        )
    if name == "backward":
        refuse_backward()


def refuse_backward() -> NoReturn:
    """Fail on a backward pass from a fan: it would add every group's gradient into one `.grad`."""
    raise FanError(
        f"backward() adds gradients that differ between tasks up in what they share{where()}. Use torch.autograd.grad, "
        f"which gives each group its own, or branch later layers only.{_way_out_of_the_model()}"
    )


def _way_out_of_the_model() -> str:
    """What to do with values that differ between tasks where no model runs: a part of one, run alone, gave them."""
    if in_forward():
        return ""
    return (
        " For one task's values outside the branched model, take out its network: recon.extract_task(branched, task)."
    )


def refuse_past_python(func: Any) -> NoReturn:
    """Fail on an operator that was called on a fan itself."""
    raise FanError(
        f"{func} was called past Python on values that differ between tasks{where()}: a compiled or scripted "
        "operator cannot map over them. Use its Python form there, or branch later layers only."
    )
