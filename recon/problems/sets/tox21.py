"""Tox21: which of twelve toxic effects a molecule has, as far as each was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from recon.models import SharedBottom
from recon.problems.files.csv_table import CsvTable, read_csv
from recon.problems.files.roots import open_root, require_files
from recon.problems.loading import Splits, loaders_of
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Problem
from recon.problems.tasks.binary import LabelledBatches, auc, binary_task

DESCRIPTION = "toxicity of 8,014 molecules, 12 tasks with missing labels, hashed SMILES, an MLP; --data-root: its CSV"

NAME = "tox21"
FILE = "tox21.csv"
TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
SMILES = "smiles"
LABELS = {"": np.nan, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
FEATURES, LONGEST = 2048, 3  # columns that n-grams are hashed to, and the largest n
TEST_PART = 0.2
BATCH = 128

_EXPECTED = (
    f"Expected is {NAME}/{FILE}, or {FILE} in the folder itself: the columns {SMILES} and {TASKS[0]} to {TASKS[-1]}, "
    "as in the file of DeepChem and MoleculeNet, https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/tox21.csv.gz "
    "(unpack it), made of the challenge's data, https://tripod.nih.gov/tox21/challenge/."
)


def tox21(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """Twelve assays of the Tox21 challenge, one task each; on average, a fifth of their labels is missing.

    The data are those of the challenge (Huang et al., Frontiers in Environmental Science 3, 2016) as MoleculeNet has
    them (Wu et al., Chemical Science 9, 2018). A fifth of the molecules, drawn at random once for all seeds, is the
    test set; a molecule that occurs twice does so on one side. (The scaffold splits of the literature are harder, and
    need a chemistry package; do not compare AUCs of the two.)

    A molecule's inputs are made from its SMILES string: the logarithms of 1 + the counts of its substrings of one to
    three characters, hashed to 2,048 columns. The network is an MLP with batch norms and much dropout; each task has a
    linear head.

    Inputs are `(N, 2048)`, float32; targets are `(N,)`, float32: 1 for toxic, 0 for not, NaN for not measured. A batch
    leaves out the tasks for which it has no label. Outputs are logits `(N, 1)`. Few molecules are toxic (3 to 16 % of
    the labels of a task), so that the AUC is the metric, over the labelled molecules.

    `data_root` holds `tox21/tox21.csv`, or the file itself. `train_samples` takes only so many molecules, in random
    order.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    path = root / FILE if (root / FILE).is_file() else root / NAME / FILE
    require_files(NAME, root, [path], _EXPECTED)

    return Problem(
        name=NAME,
        tasks=[binary_task(name, auc()) for name in TASKS],
        make_model=_model,
        make_loaders=loaders_of(lambda: _data(path, train_samples), BATCH, test_batch_size=1000),
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2),
        make_scheduler=CosineAnnealingLR,
        epochs=20,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(8, FEATURES),
    )


def _model() -> SharedBottom:
    return SharedBottom(dict.fromkeys(TASKS, 1), FEATURES, bottom=(256, 128), dropout=0.5, input_dropout=0.2, norm=True)


def _data(path: Path, train_samples: int | None) -> Splits:
    table = read_csv(path, (*TASKS, SMILES), header=True)
    smiles = table.columns[SMILES]
    table.require(SMILES, smiles != "", "the molecule's formula")
    counts, labels = _count(smiles), _labels(table)
    train, test = _split(smiles)
    check_available(NAME, len(train), train_samples)
    return _batches(counts, labels, train[:train_samples]), _batches(counts, labels, test)


def _labels(table: CsvTable) -> np.ndarray:
    """`(N, 12)`, float32."""
    for task in TASKS:
        table.require(task, np.isin(table.columns[task], list(LABELS)), "0, 1, or empty for a missing label")
    return np.array([[LABELS[label] for label in table.columns[task]] for task in TASKS], np.float32).T


def _count(smiles: np.ndarray) -> np.ndarray:
    """How often each substring occurs: `(N, FEATURES)`, uint8, a quarter of the memory of floats."""
    # Case matters: c is aromatic carbon.
    vectorizer = HashingVectorizer(
        analyzer="char", ngram_range=(1, LONGEST), n_features=FEATURES, lowercase=False, norm=None, alternate_sign=False
    )
    counts = vectorizer.transform(smiles)
    counts.data = np.minimum(counts.data, 255)
    return counts.astype(np.uint8).toarray()


def _split(smiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train and to test on, in random order."""
    molecules, molecule = np.unique(smiles, return_inverse=True)
    # RandomState, not default_rng: only its stream is frozen across numpy's versions (NEP 19).
    random = np.random.RandomState(0)
    tested = random.permutation(len(molecules))[round((1 - TEST_PART) * len(molecules)) :]
    rows = random.permutation(len(smiles))
    is_tested = np.isin(molecule[rows], tested)
    return rows[~is_tested], rows[is_tested]


def _batches(counts: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> LabelledBatches:
    targets = {task: torch.from_numpy(labels[rows, column]) for column, task in enumerate(TASKS)}
    return LabelledBatches(torch.from_numpy(counts[rows]), targets, transform=_log)


def _log(counts: Tensor) -> Tensor:
    return counts.float().log1p()
