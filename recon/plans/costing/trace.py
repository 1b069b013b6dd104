"""Records the dataflow of a forward pass while it runs.

Operations are recorded at the level of `__torch_function__`, where task fans map: what is one operation here is run
as a whole, once per group, in a branched model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from recon.plans.costing.counting import KernelMeter, byte_size, tensors_in, unfused_kernels
from recon.plans.costing.dataflow import Call, Dataflow, Operation
from recon.support.network.forward import check_outputs, fresh, run
from recon.support.network.graph import reached_leaves
from recon.support.network.hooks import hooked
from recon.support.network.state import move_statistics, state_kept
from recon.support.network.tensors import SharedTensor, storage_of
from recon.support.network.trees import leaves_of


def trace(model: nn.Module, tasks: Sequence[str], example_inputs: Any, *, training: bool) -> Dataflow:
    """Record one forward pass, in training mode (with gradients) or in evaluation mode (without)."""
    inputs = fresh(example_inputs)
    with state_kept(model), torch.set_grad_enabled(training), unfused_kernels():
        move_statistics(model)
        tracer = _Tracer(model)
        # The model is entered before its own hooks run, and left after them.
        with _watch_calls(model, tracer), tracer.meter, tracer:
            outputs = check_outputs(run(model.train(training), inputs), tasks)
        leaves = {task: [v for v in leaves_of(outputs[task]) if isinstance(v, Tensor)] for task in tasks}
        served: dict[Tensor, set[str]] = {}
        for task, values in leaves.items():
            for leaf in reached_leaves(values):
                served.setdefault(leaf, set()).add(task)
        return tracer.dataflow(
            {task: tracer.values_of(values) for task, values in leaves.items()},
            {leaf: frozenset(reached) for leaf, reached in served.items()},
        )


class _Tracer(TorchFunctionMode):
    """Knows every tensor of the pass by the value that it holds, and keeps it, so that none takes another's place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.meter = _WatchedMeter(self)
        self.parameters = tuple(model.parameters())
        held = [(path, b) for path, module in model.named_modules() for b in module._buffers.values() if b is not None]
        self.owners = tuple(path for path, _ in held)
        self.buffers = {storage_of(buffer): value for value, (_, buffer) in enumerate(held, len(self.parameters))}
        self.steps: list[Call | Operation] = []
        self.writes: dict[tuple[str, int], None] = {}
        self.unsupported: dict[str, None] = {}
        self.running = False
        self._count = len(self.parameters) + len(held)
        self._paths: list[str] = []  # of all calls
        self._open: list[int] = []  # the calls that are not over
        self._kept: list[Tensor] = []
        # A tensor's value is what was last written into its memory, or this very view of it, whichever came later.
        self._by_tensor = {id(parameter): value for value, parameter in enumerate(self.parameters)}
        self._by_memory: dict[int, int] = {}
        self._from_outside = {storage_of(p): value for value, p in enumerate(self.parameters)} | self.buffers

    def value_of(self, tensor: Tensor) -> int | None:
        """The value that a tensor holds; none for inputs and constants."""
        storage = storage_of(tensor)
        known = [self._by_tensor.get(id(tensor)), self._by_memory.get(storage)]
        return max((value for value in known if value is not None), default=self._from_outside.get(storage))

    def values_of(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """The values that tensors hold, each once."""
        values = [self.value_of(tensor) for tensor in tensors]
        return tuple(dict.fromkeys(value for value in values if value is not None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record it if it makes or writes a value."""
        self.running = True
        try:
            return self._record(func, args, kwargs or {})
        finally:
            self.running = False

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = list(tensors_in((args, kwargs)))
        inputs = self.values_of(given)
        watched = [_Watched(tensor, storage_of(tensor) in self.buffers) for tensor in given]
        macs, size = self.meter.macs, self.meter.bytes
        result = func(*args, **kwargs)
        macs, size = self.meter.macs - macs, self.meter.bytes - size
        written = [one.tensor for one in watched if one.changed]
        known = {id(tensor) for tensor in given}
        new = [tensor for tensor in tensors_in(result) if id(tensor) not in known]
        if new or written or macs or size:
            operation = Operation(
                name=getattr(func, "__name__", str(func)),
                value=self._count,
                within=self._within,
                inputs=inputs,
                macs=macs,
                bytes=size,
                written=tuple(self._overwritten(written)),
            )
            self._count += 1
            self.steps.append(operation)
            self._hold(operation.value, new, written, {storage_of(tensor) for tensor in given})
        return result

    def _overwritten(self, tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
        for tensor in tensors:
            value = self.value_of(tensor)
            if value is not None and storage_of(tensor) not in self.buffers:  # statistics are kept by group anyway
                yield value, byte_size(tensor)

    def _hold(self, value: int, new: list[Tensor], written: list[Tensor], given: set[int]) -> None:
        for tensor in (*new, *written):
            self._kept.append(tensor)
            self._by_tensor[id(tensor)] = value
        for tensor in new:
            if storage_of(tensor) not in given:
                self._by_memory[storage_of(tensor)] = value
        for tensor in written:
            storage = storage_of(tensor)
            self._by_memory[storage] = value
            if storage in self.buffers:
                self.writes[self.owners[self.buffers[storage] - len(self.parameters)], value] = None

    def enter(self, path: str, args: Any) -> None:
        """A module is called."""
        inputs = self.values_of(leaf for leaf in leaves_of(args) if isinstance(leaf, Tensor))
        self.steps.append(Call(path, self._within, inputs))
        self._open.append(len(self._paths))
        self._paths.append(path)

    def leave(self) -> None:
        """The innermost call is over."""
        self._open.pop()

    @property
    def _within(self) -> int:
        return self._open[-1] if self._open else 0

    def note_kernel(self, kernel: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """A kernel ran outside of any function, so the origin of the values in its outputs is unknown."""
        if self.values_of(inputs) and any(self.value_of(tensor) is None for tensor in outputs):
            path = self._paths[self._within]
            self.unsupported[f"{kernel} in {path}" if path else str(kernel)] = None

    def dataflow(self, outputs: Mapping[str, tuple[int, ...]], served: Mapping[Tensor, frozenset[str]]) -> Dataflow:
        """All that was recorded."""
        for path, module in self.model.named_modules():
            for buffer in module._buffers.values():
                if buffer is not None and (value := self._by_tensor.get(id(buffer))) is not None:  # assigned anew
                    self.writes[path, value] = None
        return Dataflow(
            self.parameters,
            self.owners,
            tuple(self.steps),
            outputs,
            tuple(self.writes),
            served,
            tuple(self.unsupported),
        )


class _WatchedMeter(KernelMeter):
    """Reports the kernels to the tracer that no torch function was called for: those of a scripted module, say."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel, and count."""
        with torch._C.DisableTorchFunction():  # the kernel would be taken for a function that the forward calls
            result = super().__torch_dispatch__(func, types, args, kwargs)
        if not self.tracer.running:
            self.tracer.note_kernel(func, tensors_in((args, kwargs)), tensors_in(result))
        return result


class _Watched(SharedTensor):
    """A tensor among the arguments of a function that may write into it; only buffers are compared by their value."""

    def __init__(self, tensor: Tensor, by_value: bool) -> None:
        self.tensor = tensor
        self.version = 0 if tensor.is_inference() else tensor._version
        self.value = tensor.detach().clone() if by_value else None

    @property
    def changed(self) -> bool:
        """Whether it was written into since."""
        return not self.tensor.is_inference() and super().changed


@contextmanager
def _watch_calls(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    def entering(path: str) -> Any:
        return lambda module, args, kwargs: tracer.enter(path, (args, kwargs))

    handles = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # they take no hooks
            handles += [
                module.register_forward_pre_hook(entering(path), prepend=True, with_kwargs=True),
                module.register_forward_hook(lambda *_: tracer.leave(), always_call=True),
            ]
    with hooked(handles):
        yield
