"""lower: turn a branched model into one graph for deployment, without any Python in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

from recon.branching.fans.statement import where_raised
from recon.branching.partition import Group
from recon.branching.plan import plan_of
from recon.branching.surgery.copies import copy_model
from recon.branching.tracing import let_forward_be_read, let_parameters_be_found, symbolic_len
from recon.errors import ReconError, UsageError, cut
from recon.support.network.forward import Inputs, call, run
from recon.support.network.state import state_kept
from recon.support.network.trees import leaves_of

_OTHER_SIZES = (
    "A loop over the samples, int(x.shape[0]), len(x) or a size written as a number fixes the batch size: use tensor "
    "operations over the whole batch, or pass dynamic_batch=False for a program of one size. (An input that is not a "
    "batch, but as long as one, is mistaken for one: then pass an example of another batch size.)"
)


def lower(branched: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """Turn a branched model into a `torch.export` program: one graph of tensor operations, task fans unrolled.

    The program computes what the model computes in evaluation mode, whatever mode the model is in. It holds a copy of
    the weights, under the model's names for them; `branched` is left untouched. `program.module()` takes the model's
    inputs and returns `{task name: output}`; everything before the branched layers runs once. Save the program by
    `torch.export.save`, compile it by `torch.compile(program.module())`, or pass it to `torch.onnx.export`.

    The program's outputs are compared with the model's before it is returned: on the example inputs and, with a
    dynamic batch, on twice as many samples and on one (unless one is too few for the model itself).

    Args:
        branched: made by `recon.convert` or `recon.load`.
        example_inputs: a small batch of inputs, on the model's device: any nest of tensors, or `recon.inputs(...)` for
            a forward of several arguments. Numbers, strings and `None` in it become constants of the program.
        dynamic_batch: let the program take any batch size. The batch size of the example is the first dimension of
            its first tensor; every tensor with this first dimension is treated as a batch. (A batch of one is doubled
            first: `torch.export` treats a dimension of one as a constant.) If false, the program accepts only
            inputs of the example's shapes.

    Raises:
        PlanError: the model is not branched.
        UsageError: the model cannot be copied or run; `torch.export` cannot trace it; its forward depends on the batch
            size; or the program computes something other than the model.
    """
    tasks = plan_of(branched).tasks
    size = _batch_size(example_inputs) if dynamic_batch else None
    if size == 1:
        example_inputs, size = _resized(example_inputs, 1, 2), 2
    expected, model = _run_and_copy(branched, example_inputs)
    _refuse_dataclasses(example_inputs, "The example inputs hold")
    for task in tasks:
        _refuse_dataclasses(expected[task], f"The output of task {task!r} holds")
    program = _export(model, example_inputs, size)
    module = program.module()
    try:
        outputs = _deployed_outputs(module, example_inputs)
    except Exception as error:
        raise UsageError(f"torch.export made a program that does not run: {_in_short(error)}") from error
    _check_equal(outputs, expected, tasks, "")
    if size is not None:
        for other in (2 * size, 1):
            _check_other_size(module, branched, _resized(example_inputs, size, other), tasks, other)
    return program


def _batch_size(inputs: Any) -> int | None:
    size = next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if size == 0:
        raise UsageError("The example inputs hold no sample: pass a batch of two or more.")
    return size


def _is_batch(leaf: Any, size: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _resized(inputs: Any, size: int, new_size: int) -> Any:
    """The inputs with their samples repeated, or only the first of them."""

    def resize(leaf: Any) -> Any:
        return leaf[torch.arange(new_size, device=leaf.device) % size] if _is_batch(leaf, size) else leaf

    return tree_map(resize, inputs)


def _copied(inputs: Any) -> Any:
    """New tensors: a forward may write into them, and torch 2.15 makes programs of views that accept only views."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


@contextmanager
def _deployed(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and leave no trace: the next run draws the same random numbers.

    Attention runs without torch's fast path, which gives zeros at padded positions and which programs do not use.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with state_kept(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _deployed_outputs(model: nn.Module, inputs: Any) -> Mapping[str, Any]:
    with _deployed(model):
        return call(model, _copied(inputs))


def _run_and_copy(branched: nn.Module, inputs: Any) -> tuple[Mapping[str, Any], nn.Module]:
    """The outputs, and a copy in evaluation mode, without the tensors that a forward leaves behind in attributes."""
    with _deployed(branched):
        before = [dict(vars(module)) for module in branched.modules()]
        outputs = run(branched.eval(), _copied(inputs))
        model = copy_model(branched)  # now that no attribute holds on to a gradient
        left_by_forward = [
            [name for name, value in vars(module).items() if isinstance(value, Tensor) and value is not old.get(name)]
            for module, old in zip(branched.modules(), before, strict=True)
        ]
    for module, names in zip(model.modules(), left_by_forward, strict=True):
        module.__dict__.update(dict.fromkeys(names))
    return outputs, model


def _export(model: nn.Module, inputs: Any, size: int | None) -> ExportedProgram:
    inputs = _copied(inputs)
    args, kwargs = inputs if isinstance(inputs, Inputs) else ((inputs,), {})
    shapes = ShapesCollection()
    for leaf in tree_leaves(inputs):
        if _is_batch(leaf, size):
            shapes[leaf] = {0: Dim.AUTO}
    let_parameters_be_found(model)
    let_forward_be_read(model, kwargs)
    try:
        with _deployed(model), symbolic_len(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute.* assigned during export")  # the model is a copy
            warnings.filterwarnings("ignore", "Unable to find the path of the module")  # only a note in the graph
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except ReconError:
        raise
    except Exception as error:
        raise UsageError(
            f"torch.export cannot trace the model{where_raised(error)}: {_in_short(error)} A program knows tensors "
            "and their shapes, but no values: where a value decides, use tensor operations (torch.where), not Python, "
            "and use torch's operations only."
        ) from error


def _check_other_size(module: nn.Module, branched: nn.Module, inputs: Any, tasks: Group, size: int) -> None:
    with _deployed(branched):
        try:
            expected = call(branched.eval(), _copied(inputs))
        except Exception as error:
            if size == 1:  # some models need pairs, or statistics over the batch
                return
            raise UsageError(f"The model fails on a batch of {size}: {_in_short(error)} {_OTHER_SIZES}") from error
    try:
        outputs = _deployed_outputs(module, inputs)
    except Exception as error:
        raise UsageError(
            f"The lowered program fails on a batch of {size}, the model does not: {_in_short(error)} {_OTHER_SIZES}"
        ) from error
    _check_equal(outputs, expected, tasks, f" for a batch of {size}")


def _check_equal(outputs: Mapping[str, Any], expected: Mapping[str, Any], tasks: Group, when: str) -> None:
    for task in tasks:
        difference = _difference(list(leaves_of(outputs[task])), list(leaves_of(expected[task])))
        if difference:
            raise UsageError(
                f"The lowered program's output of task {task!r} is not the model's{when}: {difference}. Python "
                "decides something in the forward, by a value or by the batch size, and the program always does what "
                "Python decided for the example. Let a tensor operation decide (torch.where)"
                + (", or pass dynamic_batch=False for a program of one size." if when else ".")
            )


def _difference(actual: Any, expected: Any) -> str | None:
    """How two outputs differ, in words; None if they agree to half of their digits."""
    if isinstance(expected, list):
        if len(actual) != len(expected):
            return f"{len(actual)} tensors in place of {len(expected)}"
        return next(filter(None, map(_difference, actual, expected)), None)
    if not isinstance(expected, Tensor):
        return None if actual == expected else f"{actual!r} in place of {expected!r}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{_dtype_and_shape(actual)} in place of {_dtype_and_shape(expected)}"
    if not (expected.is_floating_point() or expected.is_complex()):
        different = int((actual != expected).sum())
        return f"{different} of {expected.numel()} elements differ" if different else None
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    tolerance = scale * math.sqrt(torch.finfo(expected.dtype).eps)
    if torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True):
        return None
    largest = (actual - expected).abs().nan_to_num(nan=math.inf).max().item()
    return f"it differs by {largest:.3g}, where the largest value is {scale:.3g}"


def _dtype_and_shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _refuse_dataclasses(structure: Any, what: str) -> None:
    """Refuse dataclasses that are not registered, which torch.export treats as leaves."""
    for leaf in tree_leaves(structure):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            name = type(leaf).__name__
            raise UsageError(
                f"{what} a {name}: torch.export accepts a dataclass only if it is registered. Call "
                f"torch.export.register_dataclass({name}) first, or use tuples and dicts."
            )


def _in_short(error: Exception) -> str:
    line = cut(next(iter(str(error).strip().splitlines()), "no message"), 200)
    return f"{type(error).__name__}: {line.removesuffix('.')}."
