"""Reading what the published code of Recon writes (github.com/moukamisama/Recon): scores, and logs of cosines."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import MapFileError, UsageError, shortened
from recon.maps.conflict_map import ConflictMap
from recon.maps.counts import (
    BINS,
    SERIES,
    STAGES,
    Counts,
    LayerConflicts,
    bin_edges,
    pair_bin_steps,
    threshold_bin,
    thresholds_around,
)
from recon.maps.files.checks import MOST_LAYERS, MOST_STEPS
from recon.maps.files.map_file import FORMAT
from recon.support.files.documents import read_document, shown

if TYPE_CHECKING:
    from torch import Tensor

_COPY = re.compile(r"\.m_list\.\d+")  # where a layer of its networks keeps its weights
_WRAPPER = "feature_extractor."  # where its ResNet keeps the backbone
_SAID_THRESHOLD = re.compile(r"[_-]S(-?\d+(?:\.\d+)?)\.json$")
_REMEDY = "Give a {layer: score} file (.json) or a log of cosines (.pt) that the published code wrote."
_NO_COSINE = 1e-3  # how far rounding may move a cosine out of [-1, 1]


def read_published(path: str | Path, threshold: float, tasks: Sequence[str] = ()) -> ConflictMap:
    """A conflict map from a file of the published code, with its layer names brought to those of a plain network.

    A `.json` file holds `{layer: S-conflict score}` at the S that the code was given; layers are ordered by score, and
    nothing else is known of them. A `.pt` file, `{"cos": {layer: [the cosines of one step's task pairs, ...]}}`, holds
    every cosine: what `recon profile` would have counted, but for shapes and layer types, is counted from it. Cosines
    that are NaN are left out; a zero gradient has cosine 0 there, which is no conflict.

    Args:
        path: the file.
        threshold: S; of a score file, the one that its scores were counted at.
        tasks: the tasks in the order of the run; without them, a log's counts are not split by pair and quarter.

    Raises:
        MapFileError: the file is missing, damaged or something else, or fits another number of tasks.
        UsageError: the threshold is off the grid, or not the one in the name of a score file.
    """
    threshold_bin(threshold)
    if len(tasks) == 1 or len(set(tasks)) < len(tasks):
        raise UsageError(f"The tasks are {list(tasks)}. Name two or more different ones, or none.")
    path = Path(path)
    if path.suffix in (".pt", ".pth") or zipfile.is_zipfile(path):
        return _from_log(path, threshold, tasks)
    return _from_scores(path, threshold, tasks)


def _from_scores(path: Path, threshold: float, tasks: Sequence[str]) -> ConflictMap:
    said = _SAID_THRESHOLD.search(path.name)
    if said and not math.isclose(float(said[1]), threshold, abs_tol=1e-6):
        raise UsageError(
            f"The name of {path} says that its scores were counted at S={said[1]}, not {threshold:g}. Give that "
            "threshold, or rename the file if its name is wrong."
        )
    scores = read_document(path, MapFileError, _REMEDY).values
    if not 0 < len(scores) <= MOST_LAYERS:
        raise _wrong(path, f"holds {len(scores)} layers, not 1 to {MOST_LAYERS}")
    if scores.get("format") == FORMAT:
        raise _wrong(path, "is a conflict map already, which needs no import")
    for name, score in scores.items():
        if type(score) is not int or not 0 <= score <= MOST_STEPS:
            raise _wrong(path, f"the score of {name!r} is {shown(score)}, not a count")
    names = _plain_names(path, list(scores))
    layers = [LayerConflicts(names[name], "", {}, None, None, None, score=score) for name, score in scores.items()]
    made_by = {"imported": path.name, "holds": "scores"}
    return ConflictMap(tuple(tasks), threshold, None, None, (), layers, made_by)


def _from_log(path: Path, threshold: float, tasks: Sequence[str]) -> ConflictMap:
    log = _load(path)
    names = _plain_names(path, list(log))
    cosines = {name: _stack(path, name, steps) for name, steps in log.items()}
    shapes = {values.shape for values in cosines.values()}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise _wrong(path, f"some layers have {one[0]} steps of {one[1]} pairs, others {other[0]} of {other[1]}")
    steps, pairs = shapes.pop()
    _check_tasks(path, pairs, tasks)
    stages = np.minimum(STAGES - 1, STAGES * (2 * np.arange(steps) + 1) // (2 * steps))
    bin_steps = 2 ** max(0, math.ceil(math.log2(steps / SERIES)))
    pair_steps = pair_bin_steps(steps, len(log), pairs) if tasks else 0
    seen = np.stack([np.isfinite(values).any(axis=1) for values in cosines.values()])
    return ConflictMap(
        tasks=tuple(tasks),
        threshold=threshold,
        steps=steps,
        skipped=int((~seen.any(axis=0)).sum()),
        stage_steps=tuple(np.bincount(stages, minlength=STAGES).tolist()),
        layers=[
            _count(names[name], values, threshold, stages, bin_steps, pair_steps, bool(tasks))
            for name, values in cosines.items()
        ],
        made_by={"imported": path.name, "holds": "cosines"},
        bin_steps=bin_steps,
        thresholds=thresholds_around(threshold) if tasks else (),
        pair_bin_steps=pair_steps,
        met=np.max([_binned(np.isfinite(values), pair_steps) for values in cosines.values()], axis=0)
        if pair_steps
        else None,
    )


def _count(
    name: str,
    cosines: NDArray[Any],
    threshold: float,
    stages: NDArray[Any],
    bin_steps: int,
    pair_steps: int,
    by_pair: bool,
) -> LayerConflicts:
    """Tally (steps, pairs) cosines; the grid in their own precision, as the published code compares them."""
    edges = bin_edges().astype(cosines.dtype)
    seen = np.isfinite(cosines)
    conflicts = cosines < edges[threshold_bin(threshold)]
    bins = np.clip(np.searchsorted(edges, cosines[seen], side="right") - 1, 0, BINS - 1)
    split = [np.stack([counts[stages == stage].sum(axis=0) for stage in range(STAGES)]) for counts in (conflicts, seen)]
    return LayerConflicts(
        name=name,
        kind="",
        shapes={},
        histogram=np.bincount(bins, minlength=BINS),
        conflicts=split[0] if by_pair else None,
        observed=split[1] if by_pair else None,
        series=_binned(conflicts.sum(axis=1), bin_steps),
        below=np.stack([(cosines < edges[threshold_bin(s)]).sum(axis=0) for s in thresholds_around(threshold)])
        if by_pair
        else None,
        pair_series=_binned(conflicts, pair_steps) if pair_steps else None,
    )


def _binned(counts: NDArray[Any], bin_steps: int) -> Counts:
    """Counts (steps, ...) added up by bin of consecutive steps."""
    return np.asarray(np.add.reduceat(counts, np.arange(0, len(counts), bin_steps), dtype=np.int64))


def _load(path: Path) -> Mapping[str, Sequence[Tensor]]:
    from recon.support.files.tensors import (  # late: it imports torch; score files need none
        TensorFileError,
        read_tensors,
    )

    try:
        document = read_tensors(path)
    except FileNotFoundError:
        raise MapFileError(f"{path}: there is no such file. Check the path.") from None
    except TensorFileError as error:
        raise _wrong(path, str(error)) from error
    log = document.get("cos") if isinstance(document, dict) else None
    if not isinstance(log, dict) or not log:
        raise _wrong(path, "holds no table of cosines by layer under the key 'cos'")
    for name, steps in log.items():
        if not isinstance(name, str) or not isinstance(steps, (list, tuple)) or not steps:
            raise _wrong(path, f"holds no list of steps for {name!r}")
    return log


def _stack(path: Path, name: str, steps: Sequence[Tensor]) -> NDArray[Any]:
    """(steps, pairs) cosines of one layer."""
    import torch  # late: score files need none

    pairs = {tuple(step.shape) if isinstance(step, torch.Tensor) else None for step in steps}
    shape = pairs.pop()
    if pairs or shape is None or len(shape) != 1 or shape == (0,) or not steps[0].is_floating_point():
        raise _wrong(path, f"the steps of {name!r} are not tensors with a cosine for each task pair")
    cosines = torch.stack(list(steps))
    values = (cosines if cosines.dtype == torch.float64 else cosines.float()).numpy()
    if (np.abs(values[~np.isnan(values)]) > 1 + _NO_COSINE).any():
        raise _wrong(path, f"the values of {name!r} are not cosines: some lie outside [-1, 1]")
    return values


def _check_tasks(path: Path, pairs: int, tasks: Sequence[str]) -> None:
    count = (1 + math.isqrt(1 + 8 * pairs)) // 2
    if count * (count - 1) // 2 != pairs:
        raise _wrong(path, f"has {pairs} cosines a step, but no number of tasks has {pairs} pairs")
    if tasks and len(tasks) != count:
        raise MapFileError(f"{path}: has the cosines of {count} tasks, but {len(tasks)} are named: {', '.join(tasks)}.")


def _plain_names(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The names in a plain network; a network that was branched already is refused."""
    plain = {name: _COPY.sub("", name).removeprefix(_WRAPPER) for name in names}
    copies = Counter(plain.values())
    twice = [name for name in names if copies[plain[name]] > 1]
    if twice:
        raise _wrong(
            path, f"has several copies of the layer {plain[twice[0]]!r} ({shortened(twice)}): the network was branched"
        )
    return plain


def _wrong(path: Path, what: str) -> MapFileError:
    return MapFileError(f"{path}: {what}. {_REMEDY}")
