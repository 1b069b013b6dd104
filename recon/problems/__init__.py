"""Problems by name: the built-in ones, and those in a user's module or file.

Importing this package does not import torch, so listing the problems is instant.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ProblemError, UnknownNameError, UsageError
from recon.importing import call, functions_of, import_target
from recon.problems._options import check_options

if TYPE_CHECKING:
    from recon.problem import Problem

__all__ = ["call_function", "descriptions", "get", "home_of", "names"]

_BUILT_IN = {
    "digits": (
        "recon.problems.digits:digits",
        "two overlaid handwritten digits, 2 tasks, 12x12 pixels, no download, a small ResNet",
    ),
    "multi-fashion-mnist": (
        "recon.problems.multi_fashion_mnist:multi_fashion_mnist",
        "a digit and a garment overlaid, 2 tasks, 36x36 pixels, ResNet-18; --data-root: MNIST and FashionMNIST",
    ),
    "cityscapes": (
        "recon.problems.cityscapes:cityscapes",
        "7-class segmentation and inverse depth of streets, 2 tasks, 128x256 pixels, SegNet; --data-root: Cityscapes",
    ),
    "nyuv2": (
        "recon.problems.nyuv2:nyuv2",
        "13-class segmentation, depth and normals of rooms, 3 tasks, MTAN; --data-root: NYUv2, as MTAN's folders or "
        "packed (normals then derived from depth)",
    ),
    "adult": (
        "recon.problems.adult:adult",
        "income and marital status of 48,842 people, 2 tasks, rows of 94 numbers, MMoE; --data-root: UCI Adult",
    ),
    "tox21": (
        "recon.problems.tox21:tox21",
        "toxicity of 8,014 molecules, 12 tasks with missing labels, hashed SMILES, an MLP; --data-root: its CSV",
    ),
    "celeba": (
        "recon.problems.celeba:celeba",
        "attributes of a face, 40 tasks, 64x64 pixels, ResNet-18; --data-root: torchvision's CelebA",
    ),
    "pascal-context": (
        "recon.problems.pascal_context:pascal_context",
        "classes, parts, saliency, normals and edges, 5 tasks, 512x512 pixels, MobileNetV2; --data-root: PASCAL_MT",
    ),
}

_HOW_TO_NAME_ONE = (
    "A problem of your own is named path/to/file.py:function or package.module:function, "
    "where the function returns a recon.Problem."
)


def names() -> list[str]:
    """The names of the built-in problems."""
    return list(_BUILT_IN)


def descriptions() -> dict[str, str]:
    """`{name: one line}` for every built-in problem."""
    return {name: line for name, (_, line) in _BUILT_IN.items()}


def get(spec: str, **options: Any) -> Problem:
    """The problem that `spec` names.

    Files are imported as `python path/to/file.py` would run them: with their own folder first on `sys.path`.

    Args:
        spec: a built-in name, `package.module:function`, or `path/to/file.py:function`; the function returns a
            `recon.Problem`. (A `recon.Problem` in its place is as good.)
        options: what the function is called with; one that is None counts as not given. The command line gives
            `data_root`, the folder that holds the problem's data set, `train_samples`, how many training samples to
            make do with, and `pretrained`, a file of weights for its backbone. A function takes those that it has a
            use for.

    Raises:
        UnknownNameError: there is no such problem, file, module or function; names the nearest ones.
        UsageError: `spec` has none of the three forms, or the function does not take these options, or needs others.
        ProblemError: the user's code raised an exception (which is chained), or returned something else.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if spec in _BUILT_IN:
        target, _, name = _BUILT_IN[spec][0].partition(":")
        make = getattr(importlib.import_module(target), name)
        check_options(spec, make, options)
        return make(**options)
    if ":" not in spec:
        raise UnknownNameError("problem", spec, names(), _HOW_TO_NAME_ONE)
    target, _, function = spec.rpartition(":")
    if not target or not function.isidentifier():
        raise UsageError(f"Problem {spec!r} does not end in ':function'. {_HOW_TO_NAME_ONE}")
    made = call_function(spec, **options)

    from recon.problem import Problem  # late: it imports torch

    if not isinstance(made, Problem):
        raise ProblemError(f"{spec} must return a recon.Problem, but it gave {type(made).__name__}.")
    return made


def home_of(spec: str) -> str:
    """The file without its folders, or the module, that a problem comes from; a built-in one's name."""
    target, colon, _ = spec.rpartition(":")
    return Path(target).name if colon else spec


def call_function(spec: str, **options: Any) -> Any:
    """What a user's function returns; see `get` for how files are imported.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.
        options: what the function is called with.

    Raises:
        UnknownNameError: there is no such file, module or function; names the nearest ones.
        UsageError: the function does not take these options, or needs others.
        ProblemError: the user's code raised an exception (which is chained).
    """
    target, _, function = spec.rpartition(":")  # the last colon: a Windows path has one of its own
    module = import_target(target)
    if not hasattr(module, function):
        raise UnknownNameError("function", function, functions_of(module), f"Looked in {target}.")
    check_options(spec, getattr(module, function), options)
    return call(module, function, options)
