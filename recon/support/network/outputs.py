"""Names for the outputs of a model that returns a tuple or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from recon.errors import ProblemError, UsageError, type_name

Model = TypeVar("Model", bound=nn.Module)


def name_outputs(model: Model, names: Sequence[str]) -> Model:
    """Let a model that returns a tuple or a list return `{name: output}`, in place.

    Its code, its parameters and their names stay as they are: a forward hook names what the forward returns. Copies of
    the model, branched ones too, have the hook as well; it is not saved with the weights.

    Args:
        model: returns a tuple or a list; a dict stays as it is.
        names: of the outputs, in order; those that are tasks' have the tasks' names.

    Returns:
        The model.

    Raises:
        UsageError: `names` are no names, or one is there twice.
        ProblemError: when the model runs, and returns something else, or another number of outputs.
    """
    model.register_forward_hook(_Naming(check_names(names)))
    return model


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, if they are some."""
    given = () if isinstance(names, str) else tuple(names)
    if not given or not all(isinstance(name, str) for name in given) or len(set(given)) < len(given):
        raise UsageError(
            f"The names of the outputs are {names!r}. Name each once, in the order in which the model returns them: "
            "('seg', 'depth')."
        )
    return given


@dataclass(frozen=True)
class _Naming:
    """The hook. A class, so that models that have it can be copied and pickled."""

    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Mapping):
            return output
        if not isinstance(output, (tuple, list)) or len(output) != len(self.names):
            got = f"{len(output)} outputs" if isinstance(output, (tuple, list)) else type_name(output)
            raise ProblemError(
                f"The outputs are named {', '.join(map(repr, self.names))}, but the model returned {got}. Name what "
                "its forward returns, in order."
            )
        return dict(zip(self.names, output, strict=True))
