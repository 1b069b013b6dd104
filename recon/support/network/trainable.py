"""Check that recon can train a model by task gradients; say why not (sharded, not a module, without values)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recon.errors import UsageError

Model = nn.Module | Sequence[nn.Module]
"""A model, or its parts: `[encoder, decoder]`."""

_WAY_OUT = (
    "Gradients by task need the whole model in each process: leave it plain, or wrap it in "
    "torch.nn.parallel.DistributedDataParallel; the gradients are averaged over the processes."
)


def as_module(model: Any) -> nn.Module:
    """The model as one module; several modules become one that holds them, numbered."""
    if isinstance(model, (list, tuple)) and model and all(isinstance(part, nn.Module) for part in model):
        model = nn.ModuleList(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {_described(model)}. Pass the torch.nn.Module that trains, or a list of its parts.")
    refuse_untrainable(model)
    return model


def refuse_untrainable(model: nn.Module) -> None:
    """Refuse a model whose parameters are not all there in this process: sharded, or on the meta device."""
    refuse_sharded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad:
            raise UsageError(
                f"Parameter {name!r} is on the meta device and has no values. Load weights first: "
                "model.to_empty(device=...), then model.load_state_dict(...)."
            )


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a sharded model (FSDP, tensor parallel, DeepSpeed), or an engine that makes its own gradients."""
    for name, module in model.named_modules():
        if fault := _fault_of_class(type(module)):  # type: ignore[arg-type]
            raise UsageError(f"{f'Module {name!r}' if name else 'The model'} is {fault}. {_WAY_OUT}")
        for own, parameter in module._parameters.items():
            if parameter is not None and (fault := _fault_of_parameter(module, own, parameter)):
                raise UsageError(f"Parameter {f'{name}.{own}'.lstrip('.')!r} is {fault}. {_WAY_OUT}")


@lru_cache  # asked for every module in every step
def _fault_of_class(kind: type) -> str:
    for sharding in ("FullyShardedDataParallel", "FSDPModule"):
        if issubclass(kind, _loaded("torch.distributed.fsdp", sharding)):
            return f"sharded over processes ({'fully_shard' if sharding == 'FSDPModule' else sharding})"
    if all(callable(getattr(kind, name, None)) for name in ("backward", "step", "save_checkpoint")):
        return f"a {kind.__name__}, an engine with backward() and step() that ignores gradients made elsewhere"
    return ""


def _fault_of_parameter(module: nn.Module, name: str, parameter: Tensor) -> str:
    if type(parameter) is not nn.Parameter and isinstance(parameter, _loaded("torch.distributed.tensor", "DTensor")):
        return "a DTensor, sharded over processes (fully_shard, parallelize_module)"
    # Only in torch's own layers: others may have an empty parameter on purpose, to know the device, say.
    if (
        name == "weight"
        and not is_lazy(parameter)
        and parameter.shape == (0,)
        and type(module).__module__.startswith("torch.nn.")
    ):
        return "empty: its values are partitioned over processes (DeepSpeed's stage 3, say)"
    return ""


def _loaded(module: str, name: str) -> type | tuple[type, ...]:
    """A class, if its module is imported; if not, nothing is an object of it, and the import takes a second."""
    return getattr(sys.modules.get(module), name, ())


def _described(model: Any) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__}, not one of its objects"
    if isinstance(model, Optimizer):
        return f"an optimizer ({type(model).__name__})"
    if isinstance(model, LRScheduler):
        return f"a learning rate scheduler ({type(model).__name__})"
    if isinstance(model, dict):
        return "a dict; torch.nn.ModuleDict makes one module of it"
    if isinstance(model, (list, tuple)):
        kinds = dict.fromkeys("parameters" if isinstance(m, Tensor) else type(m).__name__ for m in model)
        return f"a {type(model).__name__} of {' and '.join(kinds)}" if model else f"an empty {type(model).__name__}"
    if model is None:
        return "None"
    return f"a {type(model).__name__}" + (", of parameters perhaps" if isinstance(model, Iterator) else "")
