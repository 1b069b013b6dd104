"""The pickles of Pareto MTL, read without running any code in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ProblemError

Split = tuple[np.ndarray, np.ndarray]
"""Images `(N, side, side)`, uint8, and labels `(N, 2)`, int64."""

_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    # numpy 2 renamed `core` to `_core`; either version reads both.
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def read_pickle(path: Path, side: int, classes: int) -> tuple[Split, Split]:
    """The training and the test split of a pickle `(train_x, train_y, test_x, test_y)`.

    The layout is that of the files of Lin et al., "Pareto Multi-Task Learning" (NeurIPS 2019): images of any shape with
    `side * side` grey values each, from 0 to 1 or from 0 to 255, and labels `(N, 2)` below `classes`.
    """
    try:
        with path.open("rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
    except ProblemError:
        raise
    except Exception as error:  # by pickle's documentation, a damaged file may raise anything
        raise ProblemError(f"Cannot read {path}: {type(error).__name__}: {error}. Download it again.") from error
    match loaded:
        case (np.ndarray() as train_x, np.ndarray() as train_y, np.ndarray() as test_x, np.ndarray() as test_y):
            train, test = ((train_x, train_y), (test_x, test_y))
            return _split(path, *train, side, classes), _split(path, *test, side, classes)
    raise ProblemError(f"{path} must hold four numpy arrays, (train_x, train_y, test_x, test_y), but does not.")


class _ArrayUnpickler(pickle.Unpickler):
    """Looks up what numpy arrays need, and nothing else (pickle's documentation, "Restricting Globals")."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how protocols 0 to 2 write bytes
            return lambda text, _encoding: text.encode("latin1")
        raise ProblemError(
            f"Refused to unpickle {module}.{name}: a file of this kind holds numpy arrays and nothing else, and "
            "unpickling anything else could run any code. Do not trust this file."
        )


def _split(path: Path, images: np.ndarray, labels: np.ndarray, side: int, classes: int) -> Split:
    count = len(labels) if labels.ndim else 0
    if labels.shape != (count, 2) or images.size != count * side * side or not count:
        raise ProblemError(
            f"{path} must hold images of {side}x{side} values and two labels for each, but holds arrays of the shapes "
            f"{images.shape} and {labels.shape}."
        )
    if not np.isin(labels, range(classes)).all():
        raise ProblemError(f"The labels in {path} must be whole numbers from 0 to {classes - 1}.")
    return _grey(path, images).reshape(count, side, side), labels.astype(np.int64)


def _grey(path: Path, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "biuf" or not (images.min() >= 0 and images.max() <= 255):  # which refuses NaN too
        raise ProblemError(f"The images in {path} must hold grey values from 0 to 1, or from 0 to 255.")
    scale = 255 if images.max() <= 1 else 1
    return np.rint(images * np.float32(scale)).astype(np.uint8)
